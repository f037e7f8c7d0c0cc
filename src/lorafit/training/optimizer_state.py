"""The optimizer's state as named tensors and JSON, and back; whatever the optimizer keeps, 8-bit moments included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def optimizer_state(optimizer: Any) -> tuple[Tensors, dict[str, Any]]:
    """Copies on the host: tensors named INDEX.NAME[.NAME] by parameter, and {"groups", "scalars"} for JSON.

    bitsandbytes keeps uint8 moments with their block maxima and code books in a nested mapping; names follow it down.
    """
    state = optimizer.state_dict()
    tensors: Tensors = {}
    scalars: dict[str, Any] = {}
    _flatten(state["state"], "", tensors, scalars)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    return tensors, {"groups": groups, "scalars": scalars}


def restore_optimizer(optimizer: Any, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Load what `optimizer_state` gave. ValueError when it belongs to other parameter groups."""
    now = optimizer.state_dict()["param_groups"]
    if len(now) != len(rest["groups"]):
        raise ValueError("the optimizer has other parameter groups")
    groups = [
        # JSON has no tuples, and the betas are one
        {**_with_tuples(saved), "params": group["params"]}
        for saved, group in zip(rest["groups"], now, strict=True)
    ]
    optimizer.load_state_dict({"state": _unflatten({**tensors, **rest["scalars"]}), "param_groups": groups})
    _page_again(_innermost(optimizer))


def _flatten(value: Mapping[Any, Any], prefix: str, tensors: Tensors, scalars: dict[str, Any]) -> None:
    for key, part in value.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(part, torch.Tensor):
            tensors[name] = part.detach().to("cpu", copy=True).contiguous()
        elif isinstance(part, Mapping):
            _flatten(part, name, tensors, scalars)
        else:
            scalars[name] = part


def _unflatten(flat: Mapping[str, Any]) -> dict[int, Any]:
    state: dict[int, Any] = {}
    for name, value in flat.items():
        index, *path = name.split(".")
        place = state.setdefault(int(index), {})
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return state


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in group.items()}


def _innermost(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
        optimizer = optimizer.optimizer
    return optimizer


def _page_again(optimizer: Any) -> None:
    """Move the moments of a paged optimizer back into its paged memory: loading left them on the card."""
    if not getattr(optimizer, "is_paged", False):
        return
    for weight, state in optimizer.state.items():
        for name in ("state1", "state2"):
            if name in state:
                buffer = optimizer.get_state_buffer(weight, dtype=state[name].dtype)
                buffer.copy_(state[name])
                state[name] = buffer
