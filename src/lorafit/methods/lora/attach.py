"""attach: LoRA adapters on a frozen base (Hu et al., arXiv:2106.09685), and their targets."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lorafit.backbone import output_head, text_decoder, true_numel
from lorafit.config import RunConfig
from lorafit.errors import AdapterError
from lorafit.methods.lora.adapted_model import AdaptedModel, LoraConfig, LoraLayer, PeftModel

PRESETS = {
    "qv": ("q_proj", "v_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Linears that choose experts. `all-linear` skips them, since tuning the routing unbalances the experts."""

_LAYER = re.compile(r"^(.*?\.)(\d+)\.")
_ATTENTION_KINDS = ("full_attention", "sliding_attention", "chunked_attention")


def resolve_targets(model: nn.Module, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Return the module names (or dotted endings) that `targets` selects in `model`.

    `targets` is "qv", "attention", "all-linear" or names. Raises AdapterError, listing the linear modules, if a name is
    in no layer, in only some layers, or is the output head.
    """
    linears = linear_names(model)
    if not linears:
        raise AdapterError("the model has no linear layer that could take an adapter")
    if targets == "all-linear":
        return tuple(name for name in _leaf_names(linears) if name not in ROUTERS)
    names = PRESETS[targets] if isinstance(targets, str) and targets in PRESETS else targets
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        _check_target(model, name, linears)
    return names


def linear_names(model: nn.Module) -> list[str]:
    """Return the dotted names of the linears that may take an adapter.

    These are the linears of the text decoder, without the output head.
    """
    head = output_head(model)
    inside = set(text_decoder(model).modules())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module in inside
    ]


def unambiguous(model: nn.Module, names: Sequence[str]) -> tuple[str, ...]:
    """Return `names`, or full names if `names` also select modules outside the decoder."""
    wanted = matching(names, linear_names(model))
    everywhere = matching(names, [name for name, _ in model.named_modules()])
    return tuple(names) if everywhere == wanted else tuple(sorted(wanted))


def matching(names: Sequence[str], linears: Sequence[str]) -> set[str]:
    """Return the linears that `names` select, as PEFT does.

    A name matches the whole dotted name or a dotted ending of it.
    """
    return {linear for linear in linears if any(linear == name or linear.endswith(f".{name}") for name in names)}


def _leaf_names(linears: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in linears))


def _check_target(model: nn.Module, name: str, linears: list[str]) -> None:
    fix = f"choose among {', '.join(_leaf_names(linears))}"
    found = matching([name], linears)
    if not found and any(module == name or module.endswith(f".{name}") for module, _ in model.named_modules()):
        raise AdapterError(f"{name} cannot take an adapter: it is no linear layer, or the output head", fix=fix)
    if not found:
        raise AdapterError(f"the model has no linear layer named {name}", fix=fix)
    lacking = _layers(linears) - _layers(sorted(found))
    if lacking and not _is_hybrid(model) and "." not in name:
        raise AdapterError(f"{name} is missing from {len(lacking)} of the layers, such as {min(lacking)}", fix=fix)


def _layers(names: Sequence[str]) -> set[str]:
    return {match[0].rstrip(".") for name in names if (match := _LAYER.match(name))}


def _is_hybrid(model: nn.Module) -> bool:
    """Return True if the family mixes layer kinds, so that some layers have no attention."""
    kinds = getattr(getattr(model, "config", None), "layer_types", None) or ()
    return any(kind not in _ATTENTION_KINDS for kind in kinds)


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

    The default is `config.targets`. A is drawn from `config.seed`, B is zero, so the model's answers do not change.
    Raises AdapterError if a target is not in every layer.
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
    """Return PEFT's description of the adapters of `config` on the modules `names`."""
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(names),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _draw(adapted: PeftModel, seed: int) -> None:
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


def check_attached(adapted: PeftModel, wanted: Iterable[str]) -> None:
    """Assert that exactly the linears in `wanted` have an adapter, and only fp32 adapters train."""
    found = {name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)}
    assert found == set(wanted), f"adapters on {sorted(found ^ set(wanted))[:4]} do not match the targets"
    for name, parameter in adapted.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}: small updates would be lost"
        else:
            assert not parameter.requires_grad, f"{name} is part of the frozen base, yet it trains"


def count_parameters(model: nn.Module) -> Counts:
    """Return the trainable and total parameters of `model`."""
    sizes = [(true_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return Counts(sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes))


def _cuda_devices(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
