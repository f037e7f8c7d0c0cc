"""attach: LoRA adapters on a frozen base (Hu et al., arXiv:2106.09685), and their targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit import shapes
from lorafit.backbone import (
    adapter_obstacles,
    experts_per_token,
    is_plain_linear,
    names_of_old_experts,
    output_head,
    projections_of,
    stacked_experts,
    text_decoder,
    true_numel,
    unwrapped,
)
from lorafit.config import RunConfig
from lorafit.data import token_ids
from lorafit.methods.lora.adapted_model import AdaptedModel, LoraConfig, PeftModel
from lorafit.methods.lora.dora import prepare_dora
from lorafit.methods.lora.expert_adapters import (
    adapted_layers,
    as_parameters,
    bind_experts,
    patterns,
    require_plain_beside_experts,
    set_dropout,
)
from lorafit.methods.lora.initial.fresh import initialize
from lorafit.methods.lora.token_rows import ROWS, add_rows, add_tables
from lorafit.methods.lora.whole_table import TABLE
from lorafit.shapes.families import EXPERT_NAMES


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Return the module names (or dotted endings) that `targets` selects in `model`.

    `targets` is "qv", "attention", "all-linear" or names. `lorafit.shapes.resolve_targets` answers for `plan` too.
    Raises AdapterError, listing the linear modules, if a name is in no layer or cannot take an adapter.
    """
    return shapes.resolve_targets(targets, projections_of(model), str(unwrapped(model).config.model_type))


def linear_names(model: nn.Module) -> list[str]:
    """Return the dotted names of the linears of the text decoder, without the output head."""
    head = output_head(model)
    inside = set(text_decoder(model).modules())
    return [
        name
        for name, module in model.named_modules()
        if is_plain_linear(module) and module is not head and module in inside
    ]


def adaptable_names(model: nn.Module) -> list[str]:
    """Return those of `linear_names` that may take an adapter."""
    obstacles = adapter_obstacles(model)
    found = [(name, obstacles.get(model.get_submodule(name), "")) for name in linear_names(model)]
    return [name for name, obstacle in found if obstacle in ("", EXPERT_NAMES)]


def unambiguous(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return `names`, or full names if `names` also select modules that take no adapter."""
    wanted = matching(names, adaptable_names(model))
    everywhere = matching(names, [name for name, _ in model.named_modules()])
    experts = expert_targets(model, names)
    return tuple(name for name in names if name not in experts) if everywhere == wanted else tuple(sorted(wanted))


def matching(names: Sequence[str], linears: Sequence[str]) -> set[str]:
    """Return the linears that `names` select, as PEFT does.

    A name matches the whole dotted name or a dotted ending of it.
    """
    return {linear for linear in linears if any(linear == name or linear.endswith(f".{name}") for name in names)}


@dataclass(frozen=True)
class Counts:
    """Count parameters; each 4-bit one counts as one.

    Attributes:
        trainable: parameters that train.
        total: all parameters.
    """

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Return the trainable parameters in percent of all."""
        return 100.0 * self.trainable / self.total


def attach(model: nn.Module, config: RunConfig, target_names: tuple[str, ...] | None = None) -> PeftModel:
    """Return `model` with fresh LoRA adapters, in fp32, on `target_names`.

    The default is `config.targets`. The model's answers do not change, unless `config.init_lora_weights` is loftq.
    Raises AdapterError if a target is in no layer.
    """
    names = resolve_targets(model, config.targets if target_names is None else target_names)
    wanted = matching(names, adaptable_names(model))
    experts = expert_targets(model, names)
    require_plain_beside_experts(config, wanted, names_of_old_experts(model))
    everything = {*wanted, *matching(experts, list(stacked_experts(model)))}
    lora = lora_config(config, unambiguous(model, names), experts, experts_per_token(model))
    lora.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in wanted)
    with torch.random.fork_rng(devices=_cuda_devices(model)), as_parameters(model):
        adapted = AdaptedModel(model, lora)
    if experts:
        bind_experts(adapted)
        set_dropout(adapted, config.dropout)
    if config.dora:
        prepare_dora(adapted, is_new=True)
    initialize(adapted, config)
    if config.trainable_tokens:
        add_rows(model, token_ids(config))
    if config.modules_to_save:
        add_tables(model, config.modules_to_save)
    check_attached(adapted, everything)
    return adapted


def expert_targets(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return those of `names` that select stacked experts of `model`; such names have their module's before a dot."""
    stacked = list(stacked_experts(model))
    return tuple(name for name in names if "." in name and matching([name], stacked))


def lora_config(
    config: RunConfig, names: Sequence[str], experts: Sequence[str] = (), experts_of_token: int = 1
) -> LoraConfig:
    """Return PEFT's description of the adapters of `config` on the modules `names` and the parameters `experts`."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=0.0 if experts else config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=list(names),
        bias="none",
        task_type="CAUSAL_LM",
        **patterns(config, experts, experts_of_token),
    )


def check_attached(adapted: PeftModel, wanted: Iterable[str]) -> None:
    """Assert that exactly the linears and experts in `wanted` have an adapter, and only fp32 adapters train."""
    found = set(adapted_layers(adapted.get_base_model()))
    assert found == set(wanted), f"adapters on {sorted(found ^ set(wanted))[:4]} do not match the targets"
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name or name.endswith((f".{ROWS}", f".{TABLE}")):
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}: small updates would be lost"
        else:
            assert not parameter.requires_grad, f"{name} is part of the frozen base, yet it trains"


def count_parameters(model: nn.Module) -> Counts:
    """Return the trainable and total parameters of `model`."""
    sizes = [(true_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
