"""save_adapter and load_adapter: inverse of each other, in PEFT's format; AdapterSnapshot and restore_adapter too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from lorafit.adapters.adapter_files import WEIGHTS_FILE, AdapterFiles
from lorafit.adapters.attach import check_attached
from lorafit.adapters.peft_library import LoraLayer, PeftModel, get_peft_model_state_dict
from lorafit.adapters.staged_folder import staged_folder
from lorafit.adapters.targets import linear_names, matching
from lorafit.config import RunConfig
from lorafit.errors import AdapterError


@dataclass(frozen=True)
class AdapterSnapshot:
    """An adapter's weights as they were at one moment, copied to the host, and its configuration."""

    tensors: Mapping[str, torch.Tensor]
    settings: Any

    @classmethod
    def of(cls, model: PeftModel, config: RunConfig, *, base_name: str) -> AdapterSnapshot:
        """Copy the active adapter of `model`, in fp32; training may go on while the copy is written."""
        lora = model.peft_config[model.active_adapter]
        assert lora.r == config.rank, "the adapter is not the one the settings describe"
        saved = copy.copy(lora)
        saved.revision = config.revision  # PEFT's auto classes load the base by it
        # a set is written in an order that differs from run to run
        saved.target_modules, saved.base_model_name_or_path, saved.inference_mode = (
            sorted(lora.target_modules),
            base_name,
            True,
        )
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
        return cls(
            {name: tensor.detach().to("cpu", torch.float32, copy=True).contiguous() for name, tensor in live.items()},
            saved,
        )

    @property
    def size_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def require_finite(self, where: Path) -> None:
        """AdapterError when a weight is NaN or infinite: such an adapter is never saved."""
        for name, tensor in self.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(f"{name} holds NaN or infinite values: the adapter is not saved", where=str(where))

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, which exists; whole or not is the caller's care."""
        save_file(dict(self.tensors), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        self.settings.save_pretrained(str(folder))


def save_adapter(
    model: PeftModel,
    folder: Path,
    config: RunConfig,
    *,
    base_name: str,
    written: Callable[[Path], None] | None = None,
) -> None:
    """Write the adapter to `folder`, replacing what is there, so that plain `PeftModel.from_pretrained` loads it.

    The folder appears whole or not at all, once `written` has seen the staged one. Raises RunDirError when it cannot
    be written, AdapterError when a weight is not finite.
    """
    snapshot = AdapterSnapshot.of(model, config, base_name=base_name)
    snapshot.require_finite(folder)
    with staged_folder(folder, replace=True) as staged:
        snapshot.write(staged)
        if written is not None:
            written(staged)


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Copy the weights in `folder` into the adapter that `model` trains. AdapterError when they do not fit it."""
    weights = AdapterFiles.open(folder).weights()
    live = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    if set(live) != set(weights):
        odd = min(set(live) ^ set(weights))
        raise AdapterError(f"the adapter does not fit this run: {odd} is in only one of them", where=str(folder))
    with torch.no_grad():
        for name, (a, b) in weights.items():
            sides: Any = live[name]
            for side, saved in ((sides.lora_A, a), (sides.lora_B, b)):
                weight = side[model.active_adapter].weight
                if weight.shape != saved.shape:
                    raise AdapterError(f"the adapter's shape does not fit {name}", where=str(folder))
                weight.copy_(saved)


def load_adapter(model: nn.Module, folder: Path, *, trainable: bool = False) -> PeftModel:
    """`model` with the adapter in `folder` attached, in fp32; frozen unless `trainable`.

    Raises AdapterError when the files cannot be trusted or do not fit the model.
    """
    files = AdapterFiles.open(folder)
    weights = files.weights()
    linears = linear_names(model)
    wanted = matching(files.targets, linears)
    if set(weights) != wanted:
        odd = min(set(weights) ^ wanted)
        raise AdapterError(
            f"the adapter does not fit the base: {odd} is in only one of them",
            where=str(folder),
            fix="use its own base",
        )
    modules = dict(model.named_modules())
    for name, (a, b) in weights.items():
        linear = modules[name]
        if (b.shape[0], a.shape[1]) != (linear.out_features, linear.in_features):
            raise AdapterError(f"the adapter's shape does not fit {name}", where=str(folder), fix="use its own base")
    adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    check_attached(adapted, wanted)
    return adapted
