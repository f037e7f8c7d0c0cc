"""screen: the display of commands: console, data, findings, plans and runs."""
