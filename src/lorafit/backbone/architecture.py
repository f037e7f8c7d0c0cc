"""Architecture: a base's configuration, its modules without weights, and its compute precision."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorafit.backbone.base_checkpoint import Checkpoint
from lorafit.backbone.kernels.frozen_linear_op import kernels_work
from lorafit.config import RunConfig, base_folder
from lorafit.errors import BackboneError
from lorafit.shapes.dimensions import noise_keys, published_in, read_config

# a slice is read by tensor-parallel branches alone (Bloom)
READ_WEIGHT = re.compile(r"\bself\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|size))")
TOKEN_KINDS = "mm_token_type_ids"
"""Argument of multimodal models that says which tokens are images."""
AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""Classes of transformers that load a model which continues text, the usual one first."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp8": torch.bfloat16}
FP8_CAPABILITY = (8, 9)


def read_architecture(folder: Path) -> PretrainedConfig:
    """Return the configuration of the causal language model in `folder`.

    Raises BackboneError when config.json cannot be read, needs code from the checkpoint, is no causal language
    model, or is quantized in a way other than bitsandbytes' 4 bits, FP8 or MXFP4. The latter two are dequantized while
    they are loaded, so their configuration is that of an unquantized model.
    """
    raw = read_config(folder)
    if (folder / "adapter_config.json").exists():
        # transformers would silently load that adapter, or another base
        raise BackboneError(
            "the base's folder also holds an adapter (adapter_config.json)",
            where=str(folder),
            fix="merge the adapter, or move it to another folder",
        )
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise BackboneError(_unknown(raw), where=str(folder), fix="choose a model type that transformers supports")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, OSError, AttributeError, StrictDataclassError) as error:
        raise BackboneError(f"config.json is not valid ({one_line(error)})", where=str(folder)) from error
    if not _auto_classes(config):
        what = f"transformers loads no causal language model from a base of type '{kind}'"
        raise BackboneError(what, where=str(folder), fix="choose a causal language model")
    if config.is_encoder_decoder or config.get_text_config().is_encoder_decoder:
        what = "the base is an encoder-decoder, and lorafit trains decoder-only models"
        raise BackboneError(what, where=str(folder), fix="choose a causal language model")
    if published_in(raw):
        del config.quantization_config  # its tensors are dequantized when they are read
    else:
        _check_quantization(raw.get("quantization_config"), folder)
    return config


def auto_class(architecture: PretrainedConfig) -> Any:
    """Return the class of transformers that loads a base: `AutoModelForCausalLM`, or one for multimodal models.

    The class that config.json names in `architectures` decides, so that tensors and adapters have the names that
    servers expect: Qwen 3.5 loads whole, with its vision tower, unless config.json names the language model alone.
    """
    kinds = _auto_classes(architecture)
    named = set(architecture.architectures or ())
    return next((kind for kind in kinds if named.intersection(_classes(kind, architecture))), kinds[0])


def load_whole(folder: Path, **arguments: Any) -> Any:
    """Return the model in `folder`, loaded by transformers' own class for it; no code of the checkpoint runs.

    `arguments` are those of `from_pretrained`. The tensors of a base published in FP8 or MXFP4 are dequantized one at a
    time, on the device that `device_map` names for all.
    """
    architecture = arguments.pop("config", None) or AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if published_in(read_config(folder)) is None:
        loader = auto_class(architecture)
        return loader.from_pretrained(folder, config=architecture, trust_remote_code=False, **arguments)
    return _load_dequantized(folder, architecture, **arguments)


def _load_dequantized(folder: Path, architecture: PretrainedConfig, **arguments: Any) -> Any:
    if hasattr(architecture, "quantization_config"):
        del architecture.quantization_config
    place = arguments.get("device_map")
    tensors = Checkpoint.open(folder).lazy_tensors(place.get("", "cpu") if isinstance(place, dict) else "cpu")
    arguments.pop("use_safetensors", None)
    classes = _classes(auto_class(architecture), architecture)
    named = (classes[name] for name in architecture.architectures or () if name in classes)
    kind = next(named, next(iter(classes.values())))
    found = kind.from_pretrained(None, config=architecture, state_dict=tensors, **arguments)
    model = found[0] if isinstance(found, tuple) else found
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return found


def _auto_classes(architecture: PretrainedConfig) -> list[Any]:
    return [kind for kind in AUTO_CLASSES if type(architecture) in kind._model_mapping]


def _classes(kind: Any, architecture: PretrainedConfig) -> dict[str, Any]:
    found = kind._model_mapping[type(architecture)]
    return {kind.__name__: kind for kind in (found if isinstance(found, (list, tuple)) else [found])}


def without_noise(architecture: PretrainedConfig) -> PretrainedConfig:
    """Return `architecture` with its layers' dropout and its routers' jitter off.

    They would act in training beside the setting `dropout`, which is the adapters'. Routers report no logits for their
    auxiliary loss, which frozen routers do not have. RWKV does not rescale its weights for float16, which it would do
    at each change between training and answering: it packs them in 4 bits again, and leaves adapters as they are.
    """
    if hasattr(architecture, "rescale_every"):
        architecture.rescale_every = 0
    for part in (architecture, architecture.get_text_config()):
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
        for key in noise_keys(part.to_dict()):
            setattr(part, key, 0.0)
    return architecture


def is_prequantized(architecture: PretrainedConfig) -> bool:
    """Return True when the checkpoint itself holds 4-bit weights."""
    return getattr(architecture, "quantization_config", None) is not None


def is_packed_base(folder: Path) -> bool:
    """Return True when the base in `folder` exists in 4 bits only."""
    return is_prequantized(read_architecture(folder))


def require_twin(base: Path, other: Path) -> None:
    """Raise BackboneError unless `other` is an unquantized model with the parameters and shapes of `base`."""
    architecture = read_architecture(other)
    if is_prequantized(architecture):
        what = "the model to merge onto exists in 4 bits only"
        raise BackboneError(what, where=str(other), fix="name its 16-bit original with --base")
    ours, theirs = (
        {name: tuple(weight.shape) for name, weight in skeleton(each).named_parameters()}
        for each in (read_architecture(base), architecture)
    )
    if ours != theirs:
        name = min(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        what = f"the model is not the 16-bit original of the run's base: {name} is {_shape(theirs.get(name))} "
        what += f"there and {_shape(ours.get(name))} in the base"
        raise BackboneError(what, where=str(other), fix="name the model that the base was made from")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else " × ".join(map(str, shape))


def architecture_of(model: nn.Module) -> PretrainedConfig:
    """Return the configuration that `model` carries; changing it changes the model."""
    return cast(PretrainedConfig, model.config)


def take_text_alone(model: nn.Module) -> None:
    """Let a multimodal `model` train on text. Molmo 2 refuses rows that do not say which of their tokens are images."""
    refusal = f"`{TOKEN_KINDS}` is required"
    for module in model.modules():
        call = type(module).forward
        if TOKEN_KINDS in inspect.signature(call).parameters and refusal in inspect.getsource(call):
            module.register_forward_pre_hook(_as_in_evaluation)


def _as_in_evaluation(module: nn.Module, _: Any) -> None:
    module.training = False  # of this module alone, which has no other use for it


def use_no_cache(model: nn.Module) -> None:
    """Keep no keys and values unless a call asks for them.

    Packed rows would read each other's.
    """
    for config in (architecture_of(model), architecture_of(model).get_text_config()):
        config.use_cache = False


def supported_attention(architecture: PretrainedConfig, wanted: str) -> str:
    """Return `wanted`, or "eager" for a family that does not support "sdpa".

    Gemma 2 is one: it caps its attention scores.
    """
    classes = _classes(auto_class(architecture), architecture)
    supports = all(getattr(kind, "_supports_sdpa", True) for kind in classes.values())
    return "eager" if wanted == "sdpa" and not supports else wanted


def skeleton(architecture: PretrainedConfig) -> nn.Module:
    """Return the model on the meta device: every module, no memory."""
    with torch.device("meta"):
        return cast(nn.Module, auto_class(architecture).from_config(architecture, trust_remote_code=False))


def base_skeleton(config: RunConfig) -> nn.Module:
    """Return the base of `config` on the meta device."""
    return skeleton(read_architecture(base_folder(config.base, config.revision)))


def linears_to_quantize(model: nn.Module) -> list[str]:
    """Return the names of the linears that lorafit quantizes.

    They are all of the text decoder but the output head, the modules that must stay fp32, and those whose weight the
    model's code reads. Image and audio towers stay as stored.
    """
    kept, bare = kept_in_fp32(model), bare_weights(model)
    head, inside = output_head(model), set(text_decoder(model).modules())
    return [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and module is not head
        and module in inside
        and name not in bare
        and not any(part in name.split(".") for part in kept)
    ]


def text_decoder(model: nn.Module) -> nn.Module:
    """Return the decoder of `model` that reads text, without a vision tower."""
    return cast(PreTrainedModel, model).get_decoder()


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of `model` in order."""
    return [module for module in text_decoder(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the linear that makes logits: never quantized, never adapted."""
    return cast(PreTrainedModel, model).get_output_embeddings()


def unwrapped(model: Any) -> Any:
    """Return the transformers model within DistributedDataParallel's and PEFT's wrappers, or the model itself."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def kept_in_fp32(model: nn.Module) -> list[str]:
    """Return the names of the modules that the family keeps in fp32."""
    names = [getattr(model, "_keep_in_fp32_modules", None), getattr(model, "_keep_in_fp32_modules_strict", None)]
    return [name for group in names for name in (group or ())]


def _unknown(raw: dict[str, Any]) -> str:
    kind = raw.get("model_type")
    if "auto_map" in raw:
        return f"the base ('{kind}') needs Python code from its checkpoint, and lorafit does not run such code"
    return f"transformers does not support the model type '{kind}'"


def _check_quantization(quantization: Any, folder: Path) -> None:
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "bitsandbytes" and quantization.get("load_in_4bit"):
        return
    raise BackboneError(
        f"the base is already quantized ({method or 'in an unknown way'}), and lorafit trains over bitsandbytes' "
        "4 bits, FP8 and MXFP4 alone",
        where=str(folder),
        fix="point --base at the original, unquantized model",
    )


def one_line(error: BaseException) -> str:
    """Return the message of another library's error in one line of at most 300 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def failed_forward(error: BaseException) -> str:
    """Return the sentence on a base whose forward raises `error` for a row of text."""
    return f"the base's forward fails on a row of text ({type(error).__name__}: {one_line(error)})"


def default_device() -> torch.device:
    """Return the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype(config: RunConfig, device: str | torch.device | None = None) -> torch.dtype:
    """Return `config.compute` as a dtype.

    `auto` is bf16 if the GPU has it, else fp16, and fp32 on a CPU. With "fp8" only the decoder's matmuls are in FP8,
    and all else is in bf16.
    """
    if config.compute != "auto":
        return DTYPES[config.compute]
    place = default_device() if device is None else torch.device(device)
    if place.type != "cuda":
        return torch.float32
    # emulated bf16 is slower than fp16, so it does not count
    with torch.cuda.device(place):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def computes_in_fp8(config: RunConfig, device: torch.device) -> bool:
    """Return True if the matmuls of the decoder's linears run in FP8.

    Raises BackboneError if the settings ask for FP8 and the base or the device does not support it.
    """
    if config.compute != "fp8":
        return False
    if config.quantization == "none" and config.method != "full":
        raise BackboneError("compute=fp8 needs a base in 4 bits", fix="use quantization=nf4, or compute=bf16")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < FP8_CAPABILITY:
        raise BackboneError(
            f"compute=fp8 needs an NVIDIA GPU of compute capability 8.9 or more, and this is {_in_words(device)}",
            fix="use compute=bf16",
        )
    if not kernels_work(device.index if device.index is not None else torch.cuda.current_device()):
        raise BackboneError("compute=fp8 needs Triton and a working C compiler", fix="use compute=bf16")
    return True


def _in_words(device: torch.device) -> str:
    return f"an {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "a CPU"


def bare_weights(model: nn.Module) -> set[str]:
    """Return the dotted names of the modules of `model` whose weight their parent's code reads past their forward.

    Mamba's kernels take `out_proj.weight`, Gemma 3n clamps its coefficients in place. An adapter on such a linear would
    be passed over without an error, and a 4-bit weight is no matrix to that code.
    """
    found = set()
    for path, module in model.named_modules():
        for name in _read_by(type(module)).intersection(dict(module.named_children())):  # type: ignore[arg-type]
            found.add(f"{path}.{name}" if path else name)
    return found


@cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    if not kind.__module__.startswith("transformers."):
        return frozenset()
    return frozenset(READ_WEIGHT.findall(inspect.getsource(kind)))
