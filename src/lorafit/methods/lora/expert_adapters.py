"""Expert adapters: PEFT's adapters on stacked experts, computed beside frozen 4-bit experts.

PEFT adds each expert's delta to its dense weight. Here the product with A and B runs in groups, beside the frozen
product, so nothing as large as a weight is made. Names, shapes and files are PEFT's (`target_parameters`).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone import FrozenExpertsLinear, frozen_in, grouped_linear, redirect_library_logs
from lorafit.config import RunConfig
from lorafit.errors import AdapterError
from lorafit.shapes import expert_rank

with redirect_library_logs():
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils import transformers_weight_conversion

OF_LINEAR = ".weight"
"""Ending of the name of a linear's parameter, as the feed-forwards beside experts have it in `target_parameters`."""
INNER = ".base_layer"
"""Ending of the first of two wrapped parameters of one module, in PEFT's names."""
ALIGNED = 8
"""Factor of the ranks that torch's grouped matmul takes in 16 bits; smaller ranks are filled up with zeros."""


class ExpertsAdapter(ParamWrapper):
    """An adapter on one parameter of frozen experts; a hook on the frozen layer adds its product."""

    def bind(self, linear: FrozenExpertsLinear) -> None:
        """Add this adapter's product to the output of `linear`, as long as it is not disabled."""
        self.handle = linear.register_forward_hook(self._beside)

    def _beside(self, linear: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> Tensor:
        name = self.active_adapters[0]
        if self.disable_adapters or name not in self.lora_A:
            return output
        x, offsets = inputs
        # on a CPU in fp32, as PEFT computes all adapters; a GPU's tensor cores multiply no fp32
        x = x.float() if x.device.type == "cpu" else x.to(linear.compute_dtype)
        a, b = stacked(self.lora_A[name].weight, self.lora_B[name].weight, self.num_experts)
        delta = low_rank(x, a, b, offsets)
        return (output + self.scaling[name] * delta).to(output.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the experts without adapters."""
        assert not merge, "4-bit experts are merged by AdaptedModel"
        module: Any = self
        while isinstance(module, ExpertsAdapter):
            module.handle.remove()
            module = module.base_layer
        experts: nn.Module = module
        return experts

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Return the experts' output; the adapter acts within."""
        output: Tensor = self.base_layer(x, *args, **options)
        return output


def stacked(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return PEFT's A (experts · r, in) and B (out, r · experts) as (experts, r, in) and (experts, out, r)."""
    return a.reshape(experts, -1, a.shape[1]), b.reshape(len(b), -1, experts).permute(2, 0, 1)


def low_rank(x: Tensor, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return `x (rows, in) @ Aᵀ @ Bᵀ`, (rows, out), rows sorted by expert; A (experts, r, in), B (experts, out, r)."""
    into, out = a.transpose(1, 2), b.transpose(1, 2)
    if missing := -into.shape[2] % ALIGNED if x.is_cuda else 0:
        into, out = nn.functional.pad(into, (0, missing)), nn.functional.pad(out, (0, 0, 0, missing))
    low = grouped_linear(x, into.to(x.dtype).contiguous(), offsets)
    return grouped_linear(low, out.to(x.dtype).contiguous(), offsets)


@contextmanager
def as_parameters(model: nn.Module) -> Iterator[None]:
    """Give frozen experts of `model` the 3-D parameters that PEFT looks for, without memory, within the block.

    PEFT takes the names of feed-forwards beside experts as they are, and not as those of older experts.
    """
    added: list[tuple[nn.Module, str]] = []
    rewrite = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        for module in list(model.modules()):
            for name, linear in frozen_in(module):
                value = torch.zeros((), device=linear.weight.device).expand(linear.stored)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)
                added.append((module, name))
        with warnings.catch_warnings():
            # PEFT looks for the patterns of ranks among modules alone, after it has applied them to parameters
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys did not match")
            yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = rewrite
        for module, name in added:
            del module._parameters[name]


def bind_experts(adapted: nn.Module) -> None:
    """Let the adapters on frozen experts of `adapted` compute as `ExpertsAdapter`."""
    for module in adapted.modules():
        if isinstance(module, ParamWrapper):
            frozen = dict(frozen_in(module.get_base_layer()))
            if module.parameter_name in frozen:
                module.__class__ = ExpertsAdapter
                module.bind(frozen[module.parameter_name])


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the LoRA layers of `model` by the linear, or the parameter of experts, that each adapts."""
    return {
        f"{outer(name)}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


@torch.no_grad()
def expert_deltas(model: nn.Module, adapters: Sequence[str]) -> dict[str, Tensor]:
    """Return the summed deltas of the experts of `model` as the parameters are stored, fp32, by their names."""
    deltas = {}
    for name, layer in adapted_layers(model).items():
        if isinstance(layer, ExpertsAdapter):
            total = torch.zeros(())
            for adapter in adapters:
                a, b = stacked(layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.num_experts)
                total = total.to(a.device) + layer.scaling[adapter] * torch.bmm(b.float(), a.float())
            deltas[name] = total.transpose(1, 2) if layer.get_base_layer().is_transposed else total
    return deltas


def outer(name: str) -> str:
    """Return the name of the experts' module, given that of one of its wrappers."""
    while name.endswith(INNER):
        name = name.removesuffix(INNER)
    return name


def parameter_of(module: str, parameters: Iterable[str]) -> str | None:
    """Return the parameter that PEFT's wrapper named `module` adapts; None for a linear.

    Of two parameters of one module, PEFT wraps the one into the experts first. `parameters` are PEFT's
    `target_parameters`.
    """
    experts = outer(module)
    leaves = [
        leaf
        for holder, _, leaf in (name.rpartition(".") for name in parameters)
        if holder and f".{experts}".endswith(f".{holder}")
    ]
    if not leaves:
        return None
    into = sorted(set(leaves), key=lambda leaf: leaf == "down_proj")
    return f"{experts}.{into[0] if module.endswith(INNER) else into[-1]}"


def patterns(config: RunConfig, parameters: Sequence[str], experts_per_token: int) -> dict[str, Any]:
    """Return PEFT's settings of adapters on `parameters`: their own rank, with the scale of all adapters."""
    if not parameters:
        return {}
    if config.dora:
        raise AdapterError("DoRA has no adapters on experts", where="targets", fix="set dora: false, or all-linear")
    rank = expert_rank(config.rank, experts_per_token)
    alpha = config.scale * (math.sqrt(rank) if config.rslora else rank)
    names = sorted(parameters)
    return {
        "target_parameters": names,
        "rank_pattern": dict.fromkeys(names, rank),
        "alpha_pattern": dict.fromkeys(names, alpha),
    }


def require_plain_beside_experts(config: RunConfig, names: Iterable[str], old: frozenset[str]) -> None:
    """Raise AdapterError for DoRA on a linear that PEFT adapts as a parameter: one of `names` that ends in `old`."""
    for name in sorted(names) if config.dora else ():
        if name.rpartition(".")[2] in old:
            what = f"DoRA has no adapters on {name}, which PEFT adapts as a parameter"
            raise AdapterError(what, where="targets", fix="set dora: false, or all-linear")


def beside_experts(model: nn.Module, old: frozenset[str]) -> list[str]:
    """Return the weights of the adapted linears of `model` whose last name is in `old`, as PEFT's parameters."""
    linears = (name for name, layer in adapted_layers(model).items() if not isinstance(layer, ParamWrapper))
    return [f"{name}{OF_LINEAR}" for name in linears if name.rpartition(".")[2] in old]


def split_parameters(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return PEFT's `target_parameters` as linear modules, and as parameters of experts; both sorted."""
    ordered = sorted(names)
    linears = tuple(name.removesuffix(OF_LINEAR) for name in ordered if name.endswith(OF_LINEAR))
    return linears, tuple(name for name in ordered if not name.endswith(OF_LINEAR))


def adapts_experts(config: RunConfig) -> bool:
    """Return True if the targets of `config` include stacked experts."""
    if isinstance(config.targets, str):
        return config.targets.endswith("+experts")
    return any(re.search(r"(^|\.)experts\.(gate_up_proj|up_proj|down_proj)$", name) for name in config.targets)


def set_dropout(adapted: nn.Module, dropout: float) -> None:
    """Give the adapters of linears `dropout`. PEFT has none for experts, and refuses both together."""
    for module in adapted.modules():
        if dropout and isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            for name in module.lora_dropout:
                module.lora_dropout[name] = nn.Dropout(dropout)


def check_expert_settings(raw: Mapping[str, Any], where: str, is_name: Callable[[Any], bool]) -> None:
    """Raise AdapterError unless the adapters on experts in adapter_config.json have one rank and the common scale."""
    names, ranks, alphas = (raw.get(key) or {} for key in ("target_parameters", "rank_pattern", "alpha_pattern"))
    if not isinstance(names, (list, dict)) or not all(map(is_name, names)):
        raise AdapterError("target_parameters is no list of parameter names", where=where)
    if not isinstance(ranks, dict) or not isinstance(alphas, dict) or {*ranks, *alphas} - {*split_parameters(names)[1]}:
        raise AdapterError("rank_pattern or alpha_pattern is set for linear modules, not for experts", where=where)
    experts = split_parameters(names)[1]
    found = [(ranks.get(name, raw.get("r")), alphas.get(name, raw.get("lora_alpha"))) for name in experts]
    if any(pair != found[0] for pair in found):
        raise AdapterError("the adapters on experts have more than one rank or alpha", where=where)
    power = 0.5 if raw.get("use_rslora") else 1.0
    for rank, alpha in found[:1]:
        numbers = isinstance(rank, int) and isinstance(alpha, int | float) and rank > 0
        wanted = raw["lora_alpha"] * (rank / raw["r"]) ** power if numbers else math.nan
        if not math.isclose(float(alpha or 0) if numbers else 0.0, wanted, rel_tol=1e-6):
            raise AdapterError("the adapters on experts have a scale of their own", where=where)
