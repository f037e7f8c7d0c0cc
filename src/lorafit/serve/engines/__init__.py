"""engines: the programs that answer behind the server's routes."""

from lorafit.serve.engines.builtin import BuiltinEngine, Limits
from lorafit.serve.engines.choice import engine_for, supervised_engine
from lorafit.serve.engines.supervised import ServedFolder, SupervisedEngine

__all__ = [
    "BuiltinEngine",
    "Limits",
    "ServedFolder",
    "SupervisedEngine",
    "engine_for",
    "supervised_engine",
]
