"""Fresh weights: the base's tensors one by one, read from disk.

Merging reads the checkpoint again and never uses a model that has run. On a CPU, bitsandbytes may repack a model's
4-bit weights in place during its first evaluation, and dequantizing them afterwards gives garbage without an error.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from typing import NamedTuple, cast

import torch
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
from lorafit.backbone.experts.frozen_experts import experts_to_quantize
from lorafit.backbone.experts.fused_tensors import Fusion
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

    The two names differ in some families and old checkpoints. Tensors that transformers fuses (experts) keep their
    stored name as `parameter`, unless they are asked for as fused.

    Attributes:
        stored: The tensor's name in the checkpoint.
        parameter: The name of the model's parameter that it becomes.
        tensor: The tensor, on the CPU.
        fusion: How a fused tensor is stored; None for one that is stored as it is.
    """

    stored: str
    parameter: str
    tensor: Tensor
    fusion: Fusion | None = None

    def parts(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return `tensor`, of the shape of this one, by the names under which the checkpoint stores it.

        Parameters that are stored together come out with the last of them.
        """
        return {self.stored: tensor} if self.fusion is None else self.fusion.split(self.parameter, tensor)


def fresh_weights(
    config: RunConfig, onto: MergeBase, *, device: str | torch.device | None = None, fused: Container[str] = ()
) -> Iterator[FreshWeight]:
    """Yield every tensor of the base, shard by shard, one in memory at a time.

    Parameters that the checkpoint stores in parts are yielded whole if they are in `fused` or in 4 bits.

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
        packed = {*(f"{name}.weight" for name in linears_to_quantize(model)), *experts_to_quantize(model)}
    fusions = [
        each for each in names.fusions(checkpoint) if any(name in packed or name in fused for name in each.parameters)
    ]
    names.check_found(packed - {name for each in fusions for name in each.parameters}, checkpoint)
    for fresh in _joined(checkpoint, names, fusions):
        yield fresh._replace(tensor=_through_nf4(fresh.tensor, place, dtype)) if fresh.parameter in packed else fresh


class Names:
    """Map tensor names in a checkpoint to parameter names of the model, by transformers' loading rules."""

    def __init__(self, model: nn.Module) -> None:
        rules = get_model_conversion_mapping(cast(PreTrainedModel, model))
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._prefix, self._parameters = str(model.base_model_prefix), model.state_dict()
        self._model = model
        self._source_of = dict(getattr(model, "all_tied_weights_keys", {}))

    def parameter(self, stored: str) -> str:
        """Return the parameter that the tensor named `stored` becomes.

        A tensor that is fused with others keeps its stored name.
        """
        name, pattern = self._renamed(stored)
        return name if pattern is None else stored

    def fusions(self, checkpoint: Checkpoint) -> list[Fusion]:
        """Return the parameters of the model that `checkpoint` stores in several tensors, or in another layout."""
        rules = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for stored in checkpoint.names():
            name, pattern = self._renamed(stored)
            if pattern is not None and pattern in rules and name in self._parameters:
                found[name][stored] = pattern
        fusions = [
            Fusion.of(name, sources, rules[next(iter(sources.values()))], self._model)
            for name, sources in found.items()
        ]
        return [each for each in fusions if all(name in self._parameters for name in each.parameters)]

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        return rename_source_key(stored, self._renamings, self._converters, self._prefix, self._parameters)

    def check_found(self, wanted: set[str], checkpoint: Checkpoint) -> None:
        """Raise BackboneError unless the checkpoint holds every tensor of `wanted`, or the one that it shares."""
        found = {self.parameter(stored) for stored in checkpoint.names()}
        lost = sorted(name for name in wanted - found if self._source_of.get(name) not in found)
        if lost:
            raise BackboneError(
                f"{len(lost)} linear layers are stored under other names, such as {lost[0]}",
                where=str(checkpoint.folder),
                fix="save the base with transformers' save_pretrained, and use that copy",
            )


def _joined(checkpoint: Checkpoint, names: Names, fusions: Sequence[Fusion]) -> Iterator[FreshWeight]:
    """Yield the tensors of `checkpoint`, those of a fusion together in place of the first."""
    fusion_of = {stored: fusion for fusion in fusions for stored, _ in fusion.sources}
    met: set[str] = set()
    for stored, _, _ in checkpoint.entries():
        fusion = fusion_of.get(stored)
        if fusion is None:
            yield FreshWeight(stored, names.parameter(stored), checkpoint.read(stored))
        elif fusion.parameters[0] not in met:
            met.add(fusion.parameters[0])
            made = fusion.fused({name: checkpoint.read(name) for name, _ in fusion.sources})
            yield from (FreshWeight(stored, name, tensor, fusion) for name, tensor in made.items())


def _through_nf4(weight: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return `weight` (…, columns) quantized to NF4 and dequantized again, on the CPU."""
    flat = weight.to(device).reshape(-1, weight.shape[-1])
    return dequantize(quantize(flat, compute_dtype=dtype), dtype).view(weight.shape).cpu()


def _unpacked(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Iterator[FreshWeight]:
    place = checkpoint.names()
    for name, _, _ in checkpoint.entries():
        marks = _state_names(name, place)
        if marks:
            state = {mark: checkpoint.read(mark) for mark in marks}
            quant_state = QuantState.from_dict({m.removeprefix(name + "."): t for m, t in state.items()}, device)
            yield FreshWeight(name, name, unpack(checkpoint.read(name).to(device), quant_state, dtype).cpu())
        elif not name.endswith(STATE_MARKS):
            yield FreshWeight(name, name, checkpoint.read(name))


def _state_names(name: str, present: Container[str]) -> list[str]:
    return [name + mark for mark in STATE_MARKS if name + mark in present]
