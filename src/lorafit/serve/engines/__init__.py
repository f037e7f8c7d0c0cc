"""engines: the programs that answer behind the server's routes."""

from lorafit.serve.engines.builtin import BuiltinEngine, Limits

__all__ = ["BuiltinEngine", "Limits"]
