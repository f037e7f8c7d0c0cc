"""serve: answers from a finished run or a merged model."""

from lorafit.serve.engine import Engine, InProcessEngine
from lorafit.serve.session import Session

__all__ = ["Engine", "InProcessEngine", "Session"]
