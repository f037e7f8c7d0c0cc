"""Targets: the linear modules that take an adapter, from a preset or from names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from lorafit.errors import AdapterError
from lorafit.shapes.families import Role
from lorafit.shapes.projection import Projection

FUSED: tuple[Role, ...] = ("qkv", "kv")
PRESETS: Mapping[str, tuple[Role, ...]] = {
    "qv": ("q", "v", *FUSED),
    "attention": ("q", "k", "v", "o", "attention", *FUSED),
}
"""Preset -> the roles that it selects. A fused projection stands for each of its parts."""
EVERY = ("all-linear", "all-linear+experts")
"""Presets of every linear; the second has the experts too."""
IN_WORDS = {"qv": "queries and values", "attention": "attention"}
HEADS = ("lm_head", "embed_tokens", "embed_out")


def resolve_targets(
    targets: str | Sequence[str], projections: Sequence[Projection], family: str = "the model"
) -> tuple[str, ...]:
    """Return the names of the linear modules that `targets` selects, in layer order.

    `qv` and `attention` go by the role of a projection, whatever its name, in the layers that have it. `all-linear` is
    every linear of the decoder that takes an adapter, without routers and lm_head; `all-linear+experts` has stacked
    experts too, each by the name of its parameter, such as `experts.down_proj`, and the feed-forwards beside them that
    PEFT adapts as parameters. A name that others share is returned with its module, such as `self_attn.out_proj`.
    Raises AdapterError with the model's own names when a name is wrong, when its module cannot take an adapter, and
    when nothing is selected.
    """
    linears = [part for part in projections if not part.stacked]
    if isinstance(targets, str) and (targets in EVERY or targets in PRESETS):
        chosen = _shortest(_of_preset(targets, linears, family), linears)
        return (*chosen, *_experts(projections, family)) if targets == EVERY[1] else chosen
    names = (targets,) if isinstance(targets, str) else tuple(dict.fromkeys(targets))
    if not names:
        raise AdapterError("targets is empty", where="targets", fix=_advice(linears))
    for name in names:
        if not any(part.stacked and part.packs and part.is_named(name) for part in projections):
            _check(name, linears, family)
    return names


def expert_rank(rank: int, experts_per_token: int) -> int:
    """Return the rank of an expert's adapter: those of a token's experts together have `rank`.

    Source: "LoRA Without Regret" (Schulman et al., 2025), on mixtures.
    """
    return max(1, rank // max(1, experts_per_token))


def _experts(projections: Sequence[Projection], family: str) -> tuple[str, ...]:
    found = [part for part in projections if part.stacked]
    if not found:
        what, fix = f"{family} has no stacked experts", "write targets: all-linear"
        raise AdapterError(what, where="targets", fix=fix)
    if not all(part.packs for part in found):
        what = f"the experts of {family} take no adapters, since transformers multiplies them in a way of its own"
        raise AdapterError(what, where="targets", fix="write targets: all-linear")
    return tuple(dict.fromkeys(".".join(part.path.split(".")[-2:]) for part in found))


def targets_note(targets: str | Sequence[str], projections: Sequence[Projection], family: str) -> str:
    """Return what a preset adapts beyond its usual modules, or cannot adapt; empty if it is as usual."""
    if not isinstance(targets, str):
        return ""
    linears = [part for part in projections if not part.stacked]
    notes = []
    if targets in PRESETS:
        chosen = _of_preset(targets, linears, family)
        if not any(part.role in PRESETS[targets] for part in chosen):
            usual = [part for part in linears if part.obstacle and part.role in PRESETS[targets]]
            why = f"{_names(usual)}: {usual[0].obstacle}" if usual else "no attention"
            verb = "cannot adapt" if usual else "has"
            notes.append(f"{family} {verb} {why}, so '{targets}' adapts {_names(chosen)}")
        elif fused := [part for part in chosen if part.role in FUSED]:
            notes.append(f"{family} fuses projections, so '{targets}' adapts the whole of {_names(fused)}")
    beside = targets == EVERY[1]
    refused = [p for p in linears if p.obstacle and p.role != "other" and not (beside and p.is_beside_experts)]
    if targets in EVERY and refused:
        why = "; ".join(dict.fromkeys(part.obstacle for part in refused))
        notes.append(f"'{targets}' leaves out {_names(refused)}: {why}")
    return "; ".join(notes)


def experts_note(names: Sequence[str], projections: Sequence[Projection], rank: int, experts_per_token: int) -> str:
    """Return rank and number of the weights that adapt experts; empty when `names` select none."""
    chosen = [part for part in projections if part.stacked and part.packs and any(map(part.is_named, names))]
    if not chosen:
        return ""
    own = expert_rank(rank, experts_per_token)
    weights = sum(own * (part.inputs + part.outputs) * part.count for part in chosen)
    return (
        f"adapters on experts have rank {own}, {rank} over the {experts_per_token} experts of a token, and no dropout: "
        f"{weights:,} weights"
    )


def _of_preset(preset: str, linears: Sequence[Projection], family: str) -> list[Projection]:
    beside = preset == EVERY[1]
    free = [p for p in linears if p.role != "other" and (not p.obstacle or (beside and p.is_beside_experts))]
    if preset in EVERY:
        chosen = free
    else:
        # a family without attention mixes tokens elsewhere
        chosen = [part for part in free if part.role in PRESETS[preset]] or [p for p in free if p.role == "mixer"]
    if not chosen:
        reasons = "; ".join(dict.fromkeys(part.obstacle for part in linears if part.role != "other"))
        what = "has no linear module that could take an adapter" + (f": {reasons}" if reasons and not free else "")
        if preset in PRESETS and free:
            what = f"has no projections of {IN_WORDS[preset]}"
        raise AdapterError(f"{family} {what}", where="targets", fix=_advice(linears))
    return chosen


def _shortest(chosen: Sequence[Projection], linears: Sequence[Projection]) -> tuple[str, ...]:
    """Return names that select exactly `chosen`, the bare name of a module where it suffices."""
    kept = {id(part) for part in chosen}
    shared = {part.name for part in linears if id(part) not in kept}
    return tuple(dict.fromkeys(part.path if part.name in shared else part.name for part in chosen))


def _check(name: str, linears: Sequence[Projection], family: str) -> None:
    found = [part for part in linears if part.is_named(name)]
    if any(part.is_adaptable for part in found):
        return
    if found:
        raise AdapterError(
            f"'{name}' cannot take an adapter: {found[0].obstacle}", where="targets", fix=_advice(linears)
        )
    if name.rpartition(".")[2] in HEADS:
        what = f"'{name}' is not part of the decoder, so it cannot have an adapter"
        raise AdapterError(what, where="targets", fix=f"{_advice(linears)}; modules_to_save trains it whole")
    near = difflib.get_close_matches(name.rpartition(".")[2], [part.name for part in linears], n=1, cutoff=0.6)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise AdapterError(f"{family} has no linear module '{name}'", where="targets", fix=hint + _advice(linears))


def _advice(linears: Sequence[Projection]) -> str:
    free = [part for part in linears if not part.obstacle]
    if not free:
        return "choose another base"
    attention = [part for part in free if part.is_attention] or free
    return f"write targets: [{_names(attention)}], or all-linear; the modules are {_names(free)}"


def _names(parts: Sequence[Projection]) -> str:
    return ", ".join(dict.fromkeys(part.name for part in parts))
