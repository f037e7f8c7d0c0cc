"""Answering from a finished run."""

from lorafit.serve.engine import Engine, InProcessEngine
from lorafit.serve.session import Session

__all__ = ["Engine", "InProcessEngine", "Session"]
