"""Several frozen linears of one input as one product: `x @ [W1; W2; …]ᵀ`, and back `[g1, g2, …] @ [W1; W2; …]`.

The latter is the sum of what each of them sends back, made without writing the parts and adding them up. The weights
have to lie one after another: copies that are kept do if they were made by `keep_dense_together`, and packed weights
are unpacked so. Called by compiled code alone (`engine/joined_products.py`); nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorafit.backbone.frozen_linear import FrozenLinear4bit
from lorafit.backbone.frozen_linear_op import LIBRARY
from lorafit.backbone.nf4_unpack import unpack_weight
from lorafit.backbone.weight_ticket import Holder, holder_of

LIBRARY.define(
    "frozen_products(Tensor x, Tensor[] tickets, SymInt[] out_features, SymInt in_features, bool transposed) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)


def _frozen_products(
    x: Tensor, tickets: Sequence[Tensor], out_features: Sequence[int], in_features: int, transposed: bool
) -> Tensor:
    holders = [holder_of(ticket) for ticket in tickets]
    kept = [weight for weight in (holder.dense for holder in holders) if weight is not None]
    if len(kept) < len(holders):
        weight = _unpacked(holders, sum(out_features), in_features, x)
    elif _adjoin(kept):
        weight = kept[0].as_strided((sum(out_features), in_features), (in_features, 1))
    elif transposed:  # each for itself, for putting weights together would take longer than what it saves
        parts = x.split(list(out_features), -1)
        return torch.stack([part @ weight for part, weight in zip(parts, kept, strict=True)]).sum(0)
    else:
        return torch.cat([x @ weight.t() for weight in kept], -1)
    return x @ (weight if transposed else weight.t())


def _shape_only(
    x: Tensor, tickets: Sequence[Tensor], out_features: Sequence[int], in_features: int, transposed: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], in_features if transposed else sum(out_features))


LIBRARY.impl("frozen_products", _frozen_products, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_products", _shape_only, lib=LIBRARY)

frozen_products = torch.ops.lorafit.frozen_products.default
"""`x (…, in) -> (…, sum of out)`, or with `transposed` `x (…, sum of out) -> (…, in)`, by the weights behind `tickets`,
in the dtype of `x`."""


def _unpacked(holders: Sequence[Holder], rows: int, columns: int, like: Tensor) -> Tensor:
    """The weights (rows, columns) of `holders` one below another, unpacked for this once."""
    joint = like.new_empty(rows, columns)
    place = 0
    for holder in holders:
        packed, *scales, out_features, in_features, block, quant_type = holder.packed()
        part = joint[place : place + out_features]
        unpack_weight(packed, tuple(scales), block, quant_type, out_features, in_features, like.dtype, part)
        place += out_features
    return joint


def _adjoin(weights: Sequence[Tensor]) -> bool:
    """Whether each begins in one storage where the one before it ends."""
    storage = weights[0].untyped_storage().data_ptr()
    place = weights[0].storage_offset()
    for weight in weights:
        if weight.untyped_storage().data_ptr() != storage or weight.storage_offset() != place:
            return False
        place += weight.numel()
    return True


def siblings(layer: nn.Module) -> list[list[FrozenLinear4bit]]:
    """The frozen linears of `layer`: those of one parent that take inputs of one width together, in their order.

    What reads one input is among them (queries, keys and values; gate and up), whatever a family calls it.
    """
    groups: dict[tuple[str, int], list[FrozenLinear4bit]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, FrozenLinear4bit):
            parent = name.removesuffix(".base_layer").rpartition(".")[0]  # an adapter has the layer within it
            groups.setdefault((parent, module.in_features), []).append(module)
    return list(groups.values())


def keep_dense_together(linears: Iterable[FrozenLinear4bit]) -> None:
    """`keep_dense` for all of `linears`, which take inputs of one width: one copy below another, in one tensor."""
    missing = [linear for linear in linears if not linear.copies]
    plain = [linear for linear in missing if linear.row_scales is None]
    for linear in missing:
        if linear.row_scales is not None:
            linear.keep_dense()
    if not plain:
        return
    first = plain[0]
    assert all(
        (linear.in_features, linear.compute_dtype) == (first.in_features, first.compute_dtype) for linear in plain
    )
    rows = [linear.out_features for linear in plain]
    joint = torch.empty(sum(rows), first.in_features, dtype=first.compute_dtype, device=first.weight.device)
    for linear, place in zip(plain, joint.split(rows), strict=True):
        linear.keep_dense(place)
