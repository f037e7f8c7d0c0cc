"""saving: the way of every method's trained weights to disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorafit.errors import AdapterError
from lorafit.methods.method import MethodSnapshot
from lorafit.runs import staged_folder


def require_finite(tensors: Mapping[str, Tensor], where: Path, consequence: str) -> None:
    """Raise AdapterError if a tensor is NaN or infinite. The message names it, `where` and the `consequence`."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} holds NaN or infinite values: {consequence}", where=str(where))


def save_snapshot(snapshot: MethodSnapshot, folder: Path, written: Callable[[Path], None] | None) -> None:
    """Write `snapshot` to `folder`, completely or not at all; `written` sees the staged folder before it appears."""
    snapshot.require_finite(folder)
    with staged_folder(folder, replace=True) as staged:
        snapshot.write(staged)
        if written is not None:
            written(staged)
