"""Shards: a frozen base whose decoder layers several GPUs hold together."""

from lorafit.backbone.shards.layer_shards import require_unchanged, shard_layers, shards_of
from lorafit.backbone.shards.load_shards import load_sharded, read_sharded

__all__ = [
    "load_sharded",
    "read_sharded",
    "require_unchanged",
    "shard_layers",
    "shards_of",
]
