"""Which operations of a decoder layer run again in its backward, so that their outputs need not be kept.

Selective activation checkpointing (torch.utils.checkpoint), decided operation by operation while a layer is traced:
- what is computed element by element is made again, at both levels: the compiler fuses it into its neighbours, so it
  costs next to nothing (a normed input beside the input it was made from would be 9 % of what a layer keeps);
- at level `feed_forward` the outputs of gate and up are made again too: 60 % of what a layer keeps, for 54 % of
  its matmuls. The down projection's output is never needed, so that matmul does not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lorafit.backbone import frozen_features

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
STREAM_RANK = 3


def feed_forward_widths(config: Any) -> frozenset[int]:
    """Output widths of the projections into a family's feed-forward: gate and up apart, or fused."""
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim"))
    inner = [size for size in sizes if isinstance(size, int)]
    return frozenset({*inner, *(2 * size for size in inner)} - {text.hidden_size})


def recompute_contexts(widths: frozenset[int]) -> Callable[[], Any]:
    """The `context_fn` of a checkpoint that makes again what is cheap, and products of these output widths.

    `cache_hash` says to torch what it does. Without, no layer's trace is cached on disk, only its kernels: every
    process would trace and partition it anew.
    """
    contexts = partial(create_selective_checkpoint_contexts, partial(_policy, widths))
    contexts.cache_hash = f"{_source_hash()} {sorted(widths)}"  # type: ignore[attr-defined]
    return contexts


@cache
def _source_hash() -> str:
    """Of all that a cached trace depends on beside the graph: this policy, and what lorafit's operators say of their
    outputs and gradients."""
    engine = Path(__file__).parents[1]
    files = sorted(chain(engine.rglob("*.py"), (engine.parent / "backbone").rglob("*.py")))
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _policy(widths: frozenset[int], context: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
    width = _product_width(op, args)
    if width is None:
        width = _sum_width(op, args)
        if width is not None and width not in widths:
            return CheckpointPolicy.MUST_SAVE  # else both things summed are kept in its place
    again = width in widths if width is not None else _is_cheap(op, args)
    return CheckpointPolicy.MUST_RECOMPUTE if again else CheckpointPolicy.PREFER_SAVE


def _product_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Columns that a matmul makes; None for other operations."""
    features = frozen_features(op, args)
    if features is not None:
        return features[1]
    return int(args[-1].shape[1]) if op in PRODUCTS else None


def _sum_width(op: Any, args: tuple[Any, ...]) -> int | None:
    """Columns of a sum of two streams: a residual, or a frozen output and its adapter's; None for others."""
    if op is not torch.ops.aten.add.Tensor or not all(isinstance(arg, torch.Tensor) for arg in args[:2]):
        return None
    left, right = args[:2]
    return (
        int(left.shape[2]) if left.dim() == right.dim() == STREAM_RANK and left.shape[2] == right.shape[2] > 1 else None
    )


def _is_cheap(op: Any, args: tuple[Any, ...]) -> bool:
    """Element by element on the residual stream: norms and activations.

    Heads (rank 4) are left to the compiler: a rotated query costs as much to keep as an unrotated one. So are
    comparisons: a dropout's mask must be the same one, and its random numbers are wider than the mask.
    """
    ranks = [arg.dim() for arg in args if isinstance(arg, torch.Tensor)]
    if op.namespace != "aten" or max(ranks, default=0) != STREAM_RANK:
        return False
    random = torch.Tag.nondeterministic_seeded in op.tags
    by_element = torch.Tag.pointwise in op.tags and not random and op._opname not in COMPARISONS
    return op._opname == "_to_copy" or by_element
