"""Load: the frozen base model, in 4 bits or as stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from lorafit.backbone.architecture import (
    architecture_of,
    compute_dtype,
    computes_in_fp8,
    default_device,
    is_prequantized,
    linears_to_quantize,
    load_whole,
    one_line,
    read_architecture,
    skeleton,
    supported_attention,
    take_text_alone,
    use_no_cache,
    without_noise,
)
from lorafit.backbone.base_checkpoint import AGAIN, Checkpoint
from lorafit.backbone.bitsandbytes_import import Params4bit
from lorafit.backbone.experts import experts_to_quantize, freeze_experts, quantizing_experts, restore_method
from lorafit.backbone.kernels.frozen_linear import freeze_linears
from lorafit.config import RunConfig, base_folder, read_json
from lorafit.errors import BackboneError

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYER = re.compile(r"\.\d+\.")


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype in which transformers loads the base in `folder`: config.json's, else that of its weights."""
    config = read_json(folder / "config.json", BackboneError)
    nested = config.get("text_config")
    for settings in (config, nested if isinstance(nested, dict) else {}):
        name = settings.get("dtype", settings.get("torch_dtype"))
        if name in NAMED:
            return NAMED[name]
    return STORED[Checkpoint.open(folder).widest_float()]


def load_backbone(
    config: RunConfig,
    *,
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    dense_budget_bytes: int | None = None,
    exact: bool = False,
) -> nn.Module:
    """Return the causal language model of `config.base`, frozen and without a KV cache by default.

    With quantization "nf4" each linear but the output head is a FrozenLinear4bit, and stacked experts are
    FrozenExpertsLinears, quantized from the values as they are stored; everything else is in the compute dtype.
    `device` is by default the current CUDA device, or the CPU, where dense copies may take `dense_budget_bytes` (see
    `freeze_linears`). With `exact`, FP8 settings compute in bf16 on any device; set it for everything but training.
    Raises BackboneError.
    """
    folder = base_folder(config.base, config.revision, weights=True)
    place = default_device() if device is None else torch.device(device)
    dtype, fp8 = compute_dtype(config, place), not exact and computes_in_fp8(config, place)
    architecture = without_noise(read_architecture(folder))
    checkpoint = Checkpoint.open(folder)
    arguments = _arguments(config, architecture, checkpoint, dtype)
    attention = supported_attention(architecture, attn_implementation)
    model = _from_pretrained(
        folder, config=architecture, device_map={"": place}, attn_implementation=attention, **arguments
    )
    _cast(model, dtype)
    model.requires_grad_(False)
    use_no_cache(model)
    take_text_alone(model)
    restore_method(model)
    return freeze_linears(freeze_experts(model, dtype), dtype, dense_budget_bytes, fp8=fp8)


def _arguments(
    config: RunConfig, architecture: PretrainedConfig, checkpoint: Checkpoint, dtype: torch.dtype
) -> dict[str, Any]:
    if is_prequantized(architecture):
        if config.quantization == "none":
            raise BackboneError(
                "the base is already in 4 bits", where=str(checkpoint.folder), fix="use quantization=nf4"
            )
        return {"dtype": dtype}
    if config.quantization == "none":
        return {"dtype": dtype}
    model = skeleton(architecture)
    chosen = set(linears_to_quantize(model))
    if not chosen:
        raise BackboneError(
            "the base has no torch.nn.Linear layer to quantize or adapt (GPT-2 uses another class)",
            where=str(checkpoint.folder),
            fix="choose another base",
        )
    # transformers does not check the shape of a weight that it quantizes
    checkpoint.require_shapes({f"{name}.weight": tuple(model.get_parameter(f"{name}.weight").shape) for name in chosen})
    others = [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in chosen]
    # quantize from the stored values: converting to the compute dtype would round them first
    quantization = nf4_config(dtype, others)
    if experts_to_quantize(model):
        quantizing_experts(quantization)
    return {"dtype": STORED[checkpoint.widest_float()], "quantization_config": quantization}


def nf4_config(dtype: torch.dtype, skip: list[str] | None = None) -> BitsAndBytesConfig:
    """Return the configuration of NF4 with double quantization (QLoRA, arXiv:2305.14314).

    Linears named in `skip` (the head) stay as they are.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def _from_pretrained(folder: Path, **arguments: Any) -> nn.Module:
    try:
        model, report = load_whole(folder, output_loading_info=True, use_safetensors=True, **arguments)
    except torch.OutOfMemoryError as error:
        raise BackboneError(
            "the base does not fit into the device's memory",
            where=str(folder),
            fix="use a smaller base or a larger GPU",
        ) from error
    except (ValueError, ImportError, OSError, RuntimeError, SafetensorError) as error:
        if "ignore_mismatched_sizes" in str(error):
            raise BackboneError(
                "the base's weights have other shapes than config.json says", where=str(folder), fix=AGAIN
            ) from error
        raise BackboneError(f"transformers cannot load the base ({one_line(error)})", where=str(folder)) from error
    _refuse_other_tensors(model, report, folder)
    return model


def _refuse_other_tensors(model: nn.Module, report: Mapping[str, Any], folder: Path) -> None:
    """Raise BackboneError for missing weights, and for stored layers that config.json does not count.

    transformers would give missing weights random values, and ignore extra layers. Other unused tensors are accepted.
    """
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        what = f"the base lacks {len(missing)} of the tensors in its config.json, such as {missing[0]}"
        alone = missing == ["lm_head.weight"]  # a tied head is not stored
        fix = "set tie_word_embeddings to true in its config.json, or download the base again" if alone else AGAIN
        raise BackboneError(what, where=str(folder), fix=fix)
    known = {name for name, _ in model.named_parameters()}
    beyond = sorted(name for name in report["unexpected_keys"] if LAYER.sub(".0.", name, count=1) in known)
    # layers that predict further tokens are stored after the last one; they are left out by design
    if beyond and not getattr(architecture_of(model), "num_nextn_predict_layers", 0):
        what = (
            f"the base holds tensors of layers that its config.json does not count ({len(beyond)}, such as {beyond[0]})"
        )
        raise BackboneError(what, where=str(folder), fix=AGAIN)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all but the 4-bit weights to `dtype`; computed buffers, as rotary frequencies, stay fp32."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    usual = getattr(model, "_keep_in_fp32_modules", None) or ()
    kept = {*strict, *(usual if dtype is torch.float16 else ())}
    for name, parameter in model.named_parameters():
        if isinstance(parameter, Params4bit) or not parameter.is_floating_point():
            continue
        if not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    architecture_of(model).dtype = dtype
