"""AdaptedModel: a PeftModel whose `merge_and_unload` returns the trained model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lorafit.backbone import (
    FrozenLinear4bit,
    dequantize_linear,
    dequantize_linears,
    forget_quantization,
    redirect_library_logs,
    unfreeze_experts,
)
from lorafit.methods.lora.dora import rescaled
from lorafit.methods.lora.expert_adapters import INNER, ExpertsAdapter, expert_deltas
from lorafit.methods.lora.initial.principal import is_principal, plain_factors
from lorafit.methods.lora.token_rows import remove_rows

with redirect_library_logs():  # peft imports bitsandbytes, which warns on some CPUs
    from peft import LoraConfig, PeftModel, PeftModelForCausalLM
    from peft.tuners.lora import LoraLayer
    from peft.utils import get_peft_model_state_dict

__all__ = ["AdaptedModel", "LoraConfig", "LoraLayer", "PeftModel", "PeftModelForCausalLM", "get_peft_model_state_dict"]


class AdaptedModel(PeftModelForCausalLM):
    """Extend PEFT's model with an accurate merge into a 4-bit base.

    PEFT adds the delta and rounds the sum to 4 bits again, which loses most of the training (KL 8.4e-3 to the live
    model, against 5e-5 here). This class dequantizes the base, adds the delta in fp32 and leaves plain linears in 16 or
    32 bits.
    """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear all gradients, in a third of torch's time. transformers calls it after every step.

        A 4-bit weight never has a gradient, and each look at one takes 4 µs; torch also builds every module's name.
        """
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        waiting: list[nn.Module] = [self]
        while waiting:
            module = waiting.pop()
            waiting.extend(child for child in module._modules.values() if child is not None)
            weights = (module.bias,) if isinstance(module, FrozenLinear4bit) else module._parameters.values()
            for weight in weights:
                if weight is not None and weight.grad is not None:
                    weight.grad = None

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the transformers model with the delta added, without adapters or 4-bit weights.

        It takes 2 bytes a parameter (4 on a CPU) at the end; `lorafit.merge` works shard by shard from disk instead.
        """
        base: nn.Module = self.get_base_model()
        if getattr(base, "quantization_method", None) is None:
            merged: nn.Module = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)
            remove_rows(merged, keep=True)
            return merged
        names = adapter_names or self.active_adapters
        deltas = expert_deltas(base, names)
        for path, module in list(base.named_modules()):
            parent, _, leaf = path.rpartition(".")
            if isinstance(module, ExpertsAdapter):
                if not path.endswith(INNER):  # the inner one goes with the outer
                    experts = module.unload_and_optionally_merge_module(False, False, None)
                    setattr(base.get_submodule(parent), leaf, experts)
            elif isinstance(module, LoraLayer):
                setattr(base.get_submodule(parent), leaf, _merged(module, names))
        plain = dequantize_linears(unfreeze_experts(base))
        remove_rows(plain, keep=True)
        for name, delta in deltas.items():
            weight = plain.get_parameter(name)
            weight.data.copy_(weight.data.float() + delta)
        return forget_quantization(plain)


def _merged(layer: Any, adapters: list[str]) -> nn.Linear:
    linear = dequantize_linear(layer.get_base_layer())
    with torch.no_grad():
        total = linear.weight.float()
        for name in adapters:
            if name in layer.lora_A:
                principal = is_principal(layer, name)
                a, b = (
                    plain_factors(layer, name) if principal else (layer.lora_A[name].weight, layer.lora_B[name].weight)
                )
                total = total + layer.scaling[name] * (b.float() @ a.float())
                if name in layer.lora_variant and not principal:
                    total = rescaled(total, layer.lora_magnitude_vector[name].weight)
        linear.weight.copy_(total)
    return linear
