"""Fresh weights: the base's tensors one by one, read from disk.

Merging reads the checkpoint again and never uses a model that has run. On a CPU, bitsandbytes may repack a model's
4-bit weights in place during its first evaluation, and dequantizing them afterwards gives garbage without an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lorafit.backbone.architecture import (
    compute_dtype,
    default_device,
    is_prequantized,
    linears_to_quantize,
    read_architecture,
    skeleton,
)
from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.backbone.bitsandbytes_import import QuantState
from lorafit.backbone.kernels.frozen_linear import dequantize, quantize
from lorafit.backbone.kernels.frozen_linear_op import unpack
from lorafit.config import MergeBase, RunConfig, base_folder
from lorafit.errors import BackboneError

STATE_MARKS = (
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
)
"""Suffixes of the tensors that bitsandbytes stores beside a packed weight."""


class FreshWeight(NamedTuple):
    """Hold one tensor of the base.

    The two names differ in some families and old checkpoints. Tensors that transformers fuses or renames in ways of
    its own (experts) keep their stored name as `parameter`; no adapter sits on those.

    Attributes:
        stored: The tensor's name in the checkpoint.
        parameter: The name of the model's parameter that it becomes.
        tensor: The tensor, on the CPU.
    """

    stored: str
    parameter: str
    tensor: Tensor


def fresh_weights(
    config: RunConfig, onto: MergeBase, *, device: str | torch.device | None = None
) -> Iterator[FreshWeight]:
    """Yield every tensor of the base, shard by shard, one in memory at a time.

    "original" yields tensors as stored. "quantized" quantizes each weight that `load_backbone` quantizes, and
    dequantizes it on `device` in the compute dtype there, so that it equals the live model's weight; all other tensors
    are as stored. Raises BackboneError, also for "original" of a base that exists only in 4 bits.
    """
    folder = base_folder(config.base, config.revision, weights=True)
    architecture = read_architecture(folder)
    checkpoint = Checkpoint.open(folder)
    place = default_device() if device is None else torch.device(device)
    dtype = compute_dtype(config, place)
    if is_prequantized(architecture):
        if onto == "original":
            raise BackboneError(
                "the base exists in 4 bits only, so the adapter cannot be merged onto an original",
                where=str(folder),
                fix="merge onto quantized, or pass --base with the 16-bit model that it was made from to lorafit merge",
            )
        yield from _unpacked(checkpoint, place, dtype)
        return
    model = skeleton(architecture)
    names = Names(model)
    packed: set[str] = set()
    if onto == "quantized" and config.quantization == "nf4":
        packed = {f"{name}.weight" for name in linears_to_quantize(model)}
    names.check_found(packed, checkpoint)
    for stored, tensor in _stored(checkpoint):
        name = names.parameter(stored)
        yield FreshWeight(stored, name, _through_nf4(tensor, place, dtype) if name in packed else tensor)


class Names:
    """Map tensor names in a checkpoint to parameter names of the model, by transformers' loading rules."""

    def __init__(self, model: nn.Module) -> None:
        rules = get_model_conversion_mapping(cast(PreTrainedModel, model))
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix, self._parameters = str(model.base_model_prefix), model.state_dict()

    def parameter(self, stored: str) -> str:
        """Return the parameter that the tensor named `stored` becomes.

        A tensor that is fused with others keeps its stored name.
        """
        name, converter = rename_source_key(stored, self._renamings, self._converters, self._prefix, self._parameters)
        return name if converter is None else stored

    def check_found(self, wanted: set[str], checkpoint: Checkpoint) -> None:
        """Raise BackboneError unless the checkpoint holds every tensor of `wanted`."""
        lost = sorted(wanted - {self.parameter(stored) for stored in checkpoint.names()})
        if lost:
            raise BackboneError(
                f"{len(lost)} linear layers are stored under other names, such as {lost[0]}",
                where=str(checkpoint.folder),
                fix="save the base with transformers' save_pretrained, and use that copy",
            )


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    for path, tensors in checkpoint.shards.items():
        with safe_open(path, framework="pt") as file:
            for name in tensors:
                yield name, file.get_tensor(name)


def _through_nf4(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `weight` quantized to NF4 and dequantized again, on the CPU."""
    return dequantize(quantize(weight.to(device), compute_dtype=dtype), dtype).cpu()


def _unpacked(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Iterator[FreshWeight]:
    place = {name: path for name, path, _ in checkpoint.entries()}
    for name, path in place.items():
        marks = _state_names(name, place)
        if marks:
            state = {mark: _read(place[mark], mark) for mark in marks}
            quant_state = QuantState.from_dict({m.removeprefix(name + "."): t for m, t in state.items()}, device)
            yield FreshWeight(name, name, unpack(_read(path, name).to(device), quant_state, dtype).cpu())
        elif not name.endswith(STATE_MARKS):
            yield FreshWeight(name, name, _read(path, name))


def _state_names(name: str, present: Mapping[str, Any]) -> list[str]:
    return [name + mark for mark in STATE_MARKS if name + mark in present]


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor
