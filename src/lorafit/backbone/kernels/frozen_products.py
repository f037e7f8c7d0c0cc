"""Several frozen linears of one input as one product: `x @ [W1; W2; …]ᵀ`, and back `[g1, g2, …] @ [W1; W2; …]`.

The latter is the sum of what each of them sends back, made without writing the parts and adding them up. The weights
have to lie one after another: copies that are kept do if they were made by `keep_dense_together`, and packed weights
are unpacked so. Called by compiled code alone (`engine/joined_products.py`); nothing here has a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorafit.backbone.kernels.frozen_linear import FrozenLinear4bit
from lorafit.backbone.kernels.frozen_linear_op import LIBRARY, Holder, holder_of
from lorafit.backbone.kernels.nf4 import unpack_weight

LIBRARY.define(
    "frozen_products(Tensor x, Tensor[] handles, SymInt[] out_features, SymInt in_features, bool transposed) -> Tensor",
    tags=[torch.Tag.pt2_compliant_tag],
)


def _frozen_products(
    x: Tensor, handles: Sequence[Tensor], out_features: Sequence[int], in_features: int, transposed: bool
) -> Tensor:
    holders = [holder_of(handle) for handle in handles]
    kept = [weight for weight in (holder.dense for holder in holders) if weight is not None]
    if len(kept) < len(holders):
        weights = [_unpacked(holders, sum(out_features), in_features, x)]
    else:
        weights = _runs(kept)
    if not transposed:
        parts = [x @ weight.t() for weight in weights]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    gradients = x.split([len(weight) for weight in weights], -1)
    total = gradients[0] @ weights[0]
    for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
        total += gradient @ weight
    return total


def _shape_only(
    x: Tensor, handles: Sequence[Tensor], out_features: Sequence[int], in_features: int, transposed: bool
) -> Tensor:
    return x.new_empty(*x.shape[:-1], in_features if transposed else sum(out_features))


LIBRARY.impl("frozen_products", _frozen_products, "CompositeExplicitAutograd")
torch.library.register_fake("lorafit::frozen_products", _shape_only, lib=LIBRARY)

frozen_products = torch.ops.lorafit.frozen_products.default
"""`x (…, in) -> (…, sum of out)`, or with `transposed` `x (…, sum of out) -> (…, in)`, by the weights behind `handles`,
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


def _runs(weights: Sequence[Tensor]) -> list[Tensor]:
    """`weights`, those that adjoin as one: putting others together would take longer than what that saves."""
    runs: list[list[Tensor]] = []
    for weight in weights:
        if runs and _adjoin(runs[-1][-1], weight):
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [run[0].as_strided((sum(map(len, run)), run[0].shape[1]), (run[0].shape[1], 1)) for run in runs]


def _adjoin(first: Tensor, second: Tensor) -> bool:
    """Whether `second` begins in one storage where `first` ends."""
    one_storage = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return one_storage and first.storage_offset() + first.numel() == second.storage_offset()


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
