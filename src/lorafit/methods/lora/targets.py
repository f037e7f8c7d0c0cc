"""Which linear modules get an adapter: a preset or names, resolved against the modules the model has."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from lorafit.backbone import output_head, text_decoder
from lorafit.errors import AdapterError

PRESETS = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linears that choose experts: `all-linear` leaves them alone, as tuning the routing unbalances the experts."""

_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """The module names (or dotted endings) that `targets` stands for in `model`.

    `targets` is "qv", "attention", "all-linear" or names. Raises AdapterError when a name is in no layer, in only
    some of them, or is the output head, and lists the linear modules that there are.
    """
    linears = linear_names(model)
    if not linears:
        raise AdapterError("the model has no linear layer that could take an adapter")
    if targets == "all-linear":
        return tuple(name for name in _leaf_names(linears) if name not in ROUTERS)
    names = PRESETS[targets] if isinstance(targets, str) and targets in PRESETS else targets
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _check_target(model, name, linears)
    return names


def linear_names(model: nn.Module) -> list[str]:
    """Dotted names of the linears that may take an adapter: those of the text decoder, but never the output head."""
    head = output_head(model)
    inside = set(text_decoder(model).modules())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module in inside
    ]


def unambiguous(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """`names`, or the whole names of what they select where they would also select modules outside the decoder."""
    wanted = matching(names, linear_names(model))
    everywhere = matching(names, [name for name, _ in model.named_modules()])
    return tuple(names) if everywhere == wanted else tuple(sorted(wanted))


def matching(names: Sequence[str], linears: Sequence[str]) -> set[str]:
    """The linears that `names` select, as PEFT selects them: the whole name, or a dotted ending of it."""
    return {linear for linear in linears if any(linear == name or linear.endswith(f".{name}") for name in names)}


def _leaf_names(linears: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))


def _check_target(model: nn.Module, name: str, linears: list[str]) -> None:
    fix = f"choose among {', '.join(_leaf_names(linears))}"
    found = matching([name], linears)
    if not found and any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules()):
        raise AdapterError(f"{name} cannot take an adapter: it is no linear layer, or the output head", fix=fix)
    if not found:
        raise AdapterError(f"the model has no linear layer named {name}", fix=fix)
    lacking = _layers(linears) - _layers(sorted(found))
    if lacking and not _is_hybrid(model) and "." not in name:
        raise AdapterError(f"{name} is missing from {len(lacking)} of the layers, such as {min(lacking)}", fix=fix)


def _layers(names: Sequence[str]) -> set[str]:
    return {match[0].rstrip(".") for name in names if (match := _LAYER.match(name))}


def _is_hybrid(model: nn.Module) -> bool:
    """True when the family mixes kinds of layers, so that some have no attention to adapt."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    return any(kind not in _ATTENTION_KINDS for kind in kinds)
