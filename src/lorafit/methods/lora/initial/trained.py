"""initial: fresh adapters that begin with the weights of a trained one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafit.errors import AdapterError
from lorafit.methods.lora.adapted_model import LoraLayer
from lorafit.methods.lora.adapter_folder import PREFIX, AdapterFiles, restore_adapter


def begin_with(adapted: Any, folder: Path) -> None:
    """Copy the adapter in `folder` into the fresh one of `adapted`.

    Raises AdapterError for untrusted files, other targets, or shapes of another base.
    """
    files = AdapterFiles.open(folder)
    modules = {name.removeprefix(PREFIX): module for name, module in adapted.named_modules()}
    live, theirs = {name for name, module in modules.items() if isinstance(module, LoraLayer)}, set(files.weights())
    if lacking := sorted(theirs - set(modules)):
        what = f"the initial adapter does not fit this base, which has no {lacking[0]}"
        raise AdapterError(what, where=str(folder), fix="use its own base")
    if live != theirs:
        what = f"the initial adapter is on {', '.join(files.targets)}, and this run's targets are other modules"
        raise AdapterError(what, where=str(folder), fix="leave targets out: they are the adapter's")
    restore_adapter(adapted, folder)
