"""The state of the optimizer and of every random generator, as named tensors and JSON, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    _page_again(optimizer)


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


def generators_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """torch's generators (CPU, and each visible card's) as byte tensors; Python's and numpy's for JSON."""
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{card}": state.cpu() for card, state in enumerate(torch.cuda.get_rng_state_all())}
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [str(name), np.asarray(keys).tolist(), int(place), int(has_gauss), float(cached)]
    return tensors, {"python": [version, list(words), gauss], "numpy": numpy_state}


def restore_generators(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> None:
    """Set every generator to what `generators_state` gave; cards that were not there then keep theirs."""
    torch.random.set_rng_state(tensors["cpu"])
    if torch.cuda.is_available():
        for card in range(torch.cuda.device_count()):
            if f"cuda.{card}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{card}"], card)
    version, words, gauss = rest["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), place, has_gauss, cached))


@dataclass(frozen=True, slots=True)
class RandomStreams:
    """The CPU's stream and, for training on a card, that card's. Reading them does not wait for the card."""

    cpu: torch.Tensor
    card: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> RandomStreams:
        """The streams as they stand."""
        card = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.random.get_rng_state(), card)

    def restore(self, device: torch.device) -> None:
        """Set the streams back."""
        torch.random.set_rng_state(self.cpu)
        if self.card is not None:
            torch.cuda.set_rng_state(self.card, device)
