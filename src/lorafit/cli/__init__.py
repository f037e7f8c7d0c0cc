"""The command line: one file per verb, and the only room that prints."""

from lorafit.cli.app import main

__all__ = ["main"]
