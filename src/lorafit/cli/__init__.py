"""cli: the command line, one file a command. Only this package prints."""

from lorafit.cli.app import main

__all__ = ["main"]
