"""The state of every random generator a run draws from, as tensors and JSON, and back."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


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
