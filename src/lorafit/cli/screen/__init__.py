"""What the commands show: the console, data, findings, plans, and a run as it happens."""
