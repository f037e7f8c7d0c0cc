"""api: the commands as functions, for the command line and Python callers.

Each file holds one command. The package imports nothing here, so that `check` and `plan` stay free of torch.
"""
