"""Answering from a finished run."""

from lorafit.serve.session import Session

__all__ = ["Session"]
