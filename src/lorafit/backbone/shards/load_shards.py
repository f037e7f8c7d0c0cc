"""load_shards: a base whose decoder layers are sharded while they are read, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from lorafit.backbone.architecture import (
    compute_dtype,
    computes_in_fp8,
    decoder_layers,
    default_device,
    is_prequantized,
    kept_in_fp32,
    linears_to_quantize,
    read_architecture,
    skeleton,
    supported_attention,
    take_text_alone,
    use_no_cache,
    without_noise,
)
from lorafit.backbone.base_checkpoint import AGAIN, Checkpoint
from lorafit.backbone.experts import experts_to_quantize
from lorafit.backbone.kernels.frozen_linear import freeze_linears, quantize
from lorafit.backbone.load import load_backbone, nf4_config
from lorafit.backbone.shards.layer_shards import LayerShards, install_shards, shard_layers
from lorafit.backbone.stored_weights import Reader, readers_of
from lorafit.config import RunConfig, base_folder
from lorafit.errors import BackboneError


def load_sharded(config: RunConfig, device: torch.device | None = None) -> nn.Module:
    """Return the frozen base of `config` on `device`, each decoder layer sharded over all processes.

    Each process reads and quantizes one layer after another, and keeps its share. The values are those of
    `load_backbone`. A base that is stored in 4 bits is read into host memory whole, by each process. Every process
    calls this at the same time. Raises BackboneError.
    """
    place = default_device() if device is None else device
    folder = base_folder(config.base, config.revision, weights=True)
    architecture = without_noise(read_architecture(folder))
    dtype = compute_dtype(config, place)
    if is_prequantized(architecture):
        own = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        on_host = config.model_copy(update={"compute": own})
        return shard_layers(load_backbone(on_host, device="cpu", dense_budget_bytes=0, exact=True), place)
    cast(Any, architecture)._attn_implementation = supported_attention(architecture, "sdpa")
    model = skeleton(architecture)
    in_4_bits = config.quantization == "nf4"
    if in_4_bits and experts_to_quantize(model):
        raise BackboneError("a base with packed experts is not sharded over GPUs", fix="use a GPU that holds the base")
    readers = readers_of(folder)
    missing = sorted(name for name, _ in model.named_parameters() if name not in readers)
    if missing:
        what = f"the base lacks {len(missing)} of the tensors in its config.json, such as {missing[0]}"
        raise BackboneError(what, where=str(folder), fix=AGAIN)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    Checkpoint.open(folder).require_shapes(shapes)
    return read_sharded(model, readers, place, dtype, in_4_bits=in_4_bits, fp8=computes_in_fp8(config, place))


def read_sharded(
    model: nn.Module,
    readers: Mapping[str, Reader],
    device: torch.device,
    dtype: torch.dtype,
    *,
    in_4_bits: bool,
    fp8: bool = False,
) -> nn.Module:
    """Return `model`, which has no weights yet, with those of `readers`, its decoder layers sharded over all processes.

    `readers` returns a weight by the name of its parameter. Linears are packed to NF4 if `in_4_bits`.
    """
    source, shards = _Source(model, readers, device, dtype, in_4_bits), LayerShards(device)
    source.make_buffers()
    for layer in decoder_layers(model):
        source.read(layer)
        freeze_linears(layer, dtype, 0, fp8=fp8)
        shards.take(layer)
    source.read(model)
    model.requires_grad_(False)
    use_no_cache(model)
    take_text_alone(model)
    marked: Any = model
    marked.config.dtype = dtype
    if in_4_bits:
        others = [name for name, part in model.named_modules() if type(part) is nn.Linear]
        marked.config.quantization_config = nf4_config(dtype, others)
        marked.is_loaded_in_4bit = marked.is_quantized = True
    return install_shards(model.eval(), shards)


class _Source:
    """Fill the modules of a model without weights from its checkpoint.

    Attributes:
        packed: the names of the linears that are quantized.
    """

    def __init__(
        self, model: nn.Module, readers: Mapping[str, Reader], device: torch.device, dtype: torch.dtype, in_4_bits: bool
    ) -> None:
        self.model, self.readers, self.device, self.dtype = model, readers, device, dtype
        self.packed = frozenset(linears_to_quantize(model)) if in_4_bits else frozenset[str]()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._wide = (
            set(kept_in_fp32(model))
            if dtype is torch.float16
            else set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        )

    def make_buffers(self) -> None:
        """Compute the buffers of all modules, as transformers does after it has loaded the rest."""
        for module in list(self.model.modules()):
            own = list(module.named_buffers(recurse=False))
            for name, buffer in own:
                stored = self._named(module, name)
                value = self.readers[stored]() if stored in self.readers else torch.empty_like(buffer, device="cpu")
                setattr(module, name, value.to(self.device))
            if own:
                cast(Any, self.model)._init_weights(module)  # weights are on no device yet, so they are not drawn

    def read(self, part: nn.Module) -> None:
        """Read the weights of `part` that have none yet, and quantize its linears."""
        for module in list(part.modules()):
            name = self._names.get(id(module), "")
            if name in self.packed:
                self._replace(name, cast(nn.Linear, module))
                continue
            for own, weight in list(module.named_parameters(recurse=False)):
                if weight.device.type == "meta":
                    value = self.readers[self._named(module, own)]()
                    dtype = weight.dtype if not weight.is_floating_point() else self._dtype_of(name)
                    self._put(weight, module, own, value.to(self.device, dtype))

    def _replace(self, name: str, linear: nn.Linear) -> None:
        if linear.weight.device.type != "meta":
            return
        weight = self.readers[f"{name}.weight"]().to(self.device)
        bias = None if linear.bias is None else self.readers[f"{name}.bias"]().to(self.device)
        made = quantize(weight, bias, compute_dtype=self.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, made)

    def _put(self, weight: nn.Parameter, module: nn.Module, own: str, value: torch.Tensor) -> None:
        """Set a weight wherever it is used: a tied head shares the embeddings'."""
        made = nn.Parameter(value, requires_grad=False)
        for other in self.model.modules():
            for name, known in list(other.named_parameters(recurse=False)):
                if known is weight:
                    setattr(other, name, made)

    def _named(self, module: nn.Module, own: str) -> str:
        name = self._names[id(module)]
        return f"{name}.{own}" if name else own

    def _dtype_of(self, module: str) -> torch.dtype:
        return torch.float32 if self._wide.intersection(module.split(".")) else self.dtype
