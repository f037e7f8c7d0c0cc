"""adapters: what a server answers with, from the folder to the slot in memory."""

from lorafit.serve.adapters.pool import AdapterPool
from lorafit.serve.adapters.source import AdapterVersion, ServedBase, require_sums

__all__ = ["AdapterPool", "AdapterVersion", "ServedBase", "require_sums"]
