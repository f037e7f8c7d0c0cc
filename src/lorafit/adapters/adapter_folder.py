"""save_adapter and load_adapter: inverse of each other, in PEFT's format."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from lorafit.adapters.adapter_files import WEIGHTS_FILE, AdapterFiles
from lorafit.adapters.attach import check_attached
from lorafit.adapters.peft_library import PeftModel, get_peft_model_state_dict
from lorafit.adapters.staged_folder import staged_folder
from lorafit.adapters.targets import linear_names, matching
from lorafit.config import RunConfig
from lorafit.errors import AdapterError


def save_adapter(model: PeftModel, folder: Path, config: RunConfig, *, base_name: str) -> None:
    """Write the adapter to `folder`, replacing what is there, so that plain `PeftModel.from_pretrained` loads it.

    The folder appears whole or not at all. Raises RunDirError when it cannot be written, AdapterError when a
    weight is not finite.
    """
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{name} holds NaN or infinite values: the adapter is not saved", where=str(folder))
    lora = model.peft_config[model.active_adapter]
    assert lora.r == config.rank, "the adapter is not the one the settings describe"
    saved = copy.copy(lora)
    # a set is written in an order that differs from run to run
    saved.revision = config.revision  # PEFT's auto classes load the base by it
    saved.target_modules, saved.base_model_name_or_path, saved.inference_mode = (
        sorted(lora.target_modules),
        base_name,
        True,
    )
    with staged_folder(folder, replace=True) as staged:
        save_file(tensors, staged / WEIGHTS_FILE, metadata={"format": "pt"})
        saved.save_pretrained(str(staged))


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
