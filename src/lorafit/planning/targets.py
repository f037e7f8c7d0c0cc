"""resolve_targets: from a preset or names to the modules that get an adapter, checked against the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from lorafit.errors import AdapterError
from lorafit.planning.families import Role
from lorafit.planning.shape import ModelShape

PRESETS: Mapping[str, tuple[Role, ...]] = {"qv": ("q", "v"), "attention": ("q", "k", "v", "o")}


def resolve_targets(targets: str | tuple[str, ...], shape: ModelShape) -> tuple[str, ...]:
    """The names of the linear modules that `targets` means in this model, in the order of the layer.

    `qv` and `attention` are found by what a projection does, so `o` may be called `dense` or `out_proj`;
    `all-linear` is every linear of the decoder but routers, never lm_head; names must exist. Raises AdapterError
    with the names the model has when a projection is fused, when a name is wrong, or when nothing is named.
    """
    if targets == "all-linear":
        return tuple(dict.fromkeys(linear.name for linear in shape.linears if linear.role != "other"))
    if isinstance(targets, str) and targets in PRESETS:
        return _preset(targets, shape)
    names = (targets,) if isinstance(targets, str) else tuple(dict.fromkeys(targets))
    if not names:
        raise AdapterError("no module is named", where="targets", fix=_advice(shape))
    if not shape.known:
        return names  # what an unknown family calls its modules is checked when the adapter is attached
    for name in names:
        _check(name, shape)
    return names


def _preset(preset: str, shape: ModelShape) -> tuple[str, ...]:
    by_role = {linear.role: linear.name for linear in shape.linears}
    wanted = PRESETS[preset]
    if all(role in by_role for role in wanted):
        return tuple(by_role[role] for role in wanted)
    fused = by_role.get("qkv")
    why = f"fuses queries, keys and values into '{fused}'" if fused else "has no such projections"
    raise AdapterError(
        f"'{preset}' needs separate attention projections, and {shape.family} {why}",
        where="targets",
        fix=_advice(shape),
    )


def _check(name: str, shape: ModelShape) -> None:
    leaf = name.rpartition(".")[2]
    if leaf in shape.module_names:
        return
    if leaf in ("lm_head", "embed_tokens", "embed_out"):
        raise AdapterError(
            f"'{name}' is not part of the decoder, and stays frozen without an adapter",
            where="targets",
            fix=_advice(shape),
        )
    near = difflib.get_close_matches(leaf, shape.module_names, n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise AdapterError(f"{shape.family} has no linear module '{name}'", where="targets", fix=hint + _advice(shape))


def _advice(shape: ModelShape) -> str:
    attention = [linear.name for linear in shape.linears if linear.is_attention]
    names = ", ".join(shape.module_names)
    return f"write targets: [{', '.join(dict.fromkeys(attention))}], or all-linear; it has {names}"
