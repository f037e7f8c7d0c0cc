"""attach: LoRA adapters on a frozen base (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorafit.backbone import true_numel
from lorafit.config import RunConfig
from lorafit.methods.lora.adapted_model import AdaptedModel, LoraConfig, LoraLayer, PeftModel
from lorafit.methods.lora.targets import PRESETS, linear_names, matching, resolve_targets, unambiguous


@dataclass(frozen=True)
class Counts:
    """Parameters that train and all there are, 4-bit ones counted one by one."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / self.total


def attach(model: nn.Module, config: RunConfig, target_names: tuple[str, ...] | None = None) -> PeftModel:
    """`model` with fresh LoRA adapters, in fp32, on `target_names` (default: `config.targets`).

    A is drawn from `config.seed`, B is zero: the model answers as before. Raises AdapterError when a target does
    not exist in every layer.
    """
    names = resolve_targets(model, config.targets if target_names is None else target_names)
    wanted = matching(names, linear_names(model))
    lora = lora_config(config, unambiguous(model, names))
    with torch.random.fork_rng(devices=_cuda_devices(model)):
        adapted = AdaptedModel(model, lora)
    _draw(adapted, config.seed)
    check_attached(adapted, wanted)
    return adapted


def lora_config(config: RunConfig, names: Sequence[str] = PRESETS["qv"]) -> LoraConfig:
    """PEFT's description of the adapters of `config` on the modules `names`."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(names),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _draw(adapted: PeftModel, seed: int) -> None:
    """PEFT's own initialisation of A, drawn on the CPU in fp32: the same on every device and in every precision."""
    generator = torch.Generator().manual_seed(seed)
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            for a in module.lora_A.values():
                fresh = torch.empty(a.weight.shape)
                nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                a.weight.data.copy_(fresh)


def check_attached(adapted: PeftModel, wanted: Iterable[str]) -> None:
    """Assert that exactly the linears in `wanted` have an adapter, and that only fp32 adapter weights train."""
    found = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert found == set(wanted), f"adapters on {sorted(found ^ set(wanted))[:4]} do not match the targets"
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}: small updates would be lost"
        else:
            assert not parameter.requires_grad, f"{name} is part of the frozen base, yet it trains"


def count_parameters(model: nn.Module) -> Counts:
    """Trainable and total parameters of `model`."""
    sizes = [(true_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
