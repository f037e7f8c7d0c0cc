"""Quantizer: transformers' loading of 4-bit linears, extended to the experts, one parameter of a layer at a time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from lorafit.backbone.experts.frozen_experts import experts_to_quantize, pack

METHOD = "lorafit_nf4"


def quantizing_experts(config: BitsAndBytesConfig) -> BitsAndBytesConfig:
    """Let `from_pretrained(quantization_config=config)` quantize stacked experts too, and return `config`."""
    config.quant_method = METHOD
    return config


def restore_method(model: Any) -> None:
    """Give `model` bitsandbytes' own mark again, which other libraries look for."""
    if getattr(model, "quantization_method", None) == METHOD:
        model.quantization_method = QuantizationMethod.BITS_AND_BYTES
        model.config.quantization_config.quant_method = QuantizationMethod.BITS_AND_BYTES


class _Quantize(Bnb4bitQuantize):
    """Quantize a linear's weight, or the experts of one layer as transformers has fused them."""

    def convert(self, input_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Return 4-bit parameters by their full names."""
        model, found = options["model"], dict[str, Any]()
        for name, value in input_dict.items():
            if name not in self.hf_quantizer.experts:
                found |= super().convert({name: value}, **options)
                continue
            weight: Tensor = value[0] if isinstance(value, list) else value
            wanted = model.get_parameter(name).shape
            if weight.shape != wanted:
                raise ValueError(f"{name} is {tuple(weight.shape)}, and config.json says {tuple(wanted)}")
            found[name] = pack(weight)
        return found


@register_quantizer(METHOD)
class Nf4WithExperts(Bnb4BitHfQuantizer):
    """Quantize a base's linears as bitsandbytes does, and its stacked experts in the same format."""

    experts: frozenset[str] = frozenset()

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Return True for the weights that are quantized while they are loaded."""
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **options)

    def get_quantize_ops(self) -> Any:
        """Return the operation that quantizes one parameter."""
        return _Quantize(self)

    def _process_model_before_weight_loading(self, model: nn.Module, *args: Any, **options: Any) -> None:
        self.experts = frozenset(experts_to_quantize(model))
        super()._process_model_before_weight_loading(model, *args, **options)
