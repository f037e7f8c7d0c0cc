"""fresh: draw or compute the weights that fresh adapters begin with, after the setting `init_lora_weights`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafit.backbone import fresh_weights, is_packed_base
from lorafit.config import RunConfig, base_folder
from lorafit.errors import AdapterError
from lorafit.methods.lora.adapted_model import LoraLayer, PeftModel
from lorafit.methods.lora.dora import dense_weight
from lorafit.methods.lora.expert_adapters import adapts_experts
from lorafit.methods.lora.initial.factors import orthonormal, principal
from lorafit.methods.lora.initial.principal import begin_with_product


def initialize(adapted: PeftModel, config: RunConfig) -> None:
    """Set the weights of the fresh adapters of `adapted`.

    By default A is drawn from `config.seed` and B is zero. Raises AdapterError for an initialization that the base or
    the targets do not allow.
    """
    if config.init_lora_weights == "default":
        draw(adapted, config.seed)
        return
    _require_possible(adapted, config)
    layers = _layers(adapted)
    if config.init_lora_weights == "loftq":
        _begin_with_errors(layers, adapted.active_adapter, config)
        return
    for layer in layers.values():
        weight = dense_weight(layer.get_base_layer())
        if config.init_lora_weights == "pissa":
            pair = principal(weight, config.rank, config.scale, config.seed)
        else:
            pair = orthonormal(weight, config.rank)
        begin_with_product(layer, adapted.active_adapter, *_same_everywhere(pair))


def draw(adapted: nn.Module, seed: int) -> None:
    """Draw A as PEFT does, on the CPU in fp32.

    The values are then the same on every device and in every precision.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for a in module.lora_A.values():
                fresh = torch.empty(a.weight.shape)
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                a.weight.data.copy_(fresh)


def _begin_with_errors(layers: dict[str, Any], name: str, config: RunConfig) -> None:
    """Let each adapter begin as the best approximation of what quantizing its weight to NF4 lost."""
    with torch.no_grad():
        for layer, original in _originals(layers, config):
            held = dense_weight(layer.get_base_layer())
            error = original.to(held.device).float() - held
            a, b = _same_everywhere(principal(error, config.rank, config.scale, config.seed))
            layer.lora_A[name].weight.copy_(a)
            layer.lora_B[name].weight.copy_(b)


def _originals(layers: dict[str, Any], config: RunConfig) -> Iterator[tuple[Any, Tensor]]:
    """Yield each layer with its weight (out, in) as the checkpoint stores it."""
    left = {f"{path}.weight": layer for path, layer in layers.items()}
    for fresh in fresh_weights(config, "original", fused=left):
        layer = left.pop(fresh.parameter, None)
        if layer is not None:
            yield layer, fresh.tensor
    assert not left, f"the checkpoint lacks {min(left)}"


def _layers(adapted: PeftModel) -> dict[str, Any]:
    base = adapted.get_base_model()
    return {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}


def _require_possible(adapted: PeftModel, config: RunConfig) -> None:
    chosen = f"init_lora_weights is {config.init_lora_weights}"
    if adapts_experts(config):
        what = f"{chosen}, which is for linear modules, and targets include experts"
        raise AdapterError(what, where="init_lora_weights", fix="leave it out, or set targets: all-linear")
    if config.init_lora_weights == "loftq" and is_packed_base(base_folder(config.base, config.revision)):
        what = f"{chosen}, and the base exists in 4 bits only, so nobody knows what quantizing it lost"
        raise AdapterError(what, where="init_lora_weights", fix="leave it out, or train over the 16-bit base")
    for path, layer in _layers(adapted).items():
        most = min(layer.in_features, layer.out_features)
        if config.rank > most:
            what = f"{chosen}, and {path} has only {most} components for rank {config.rank}"
            raise AdapterError(what, where="rank", fix=f"set rank to {most} or less")


def _same_everywhere(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the pair of process 0: a decomposition may differ in its last bits from GPU to GPU."""
    if dist.is_available() and dist.is_initialized():
        for tensor in pair:
            dist.broadcast(tensor, src=0)
    return pair
