"""Recurrence: the modules of decoder layers that carry a state along the sequence, and the memory that they take.

Such modules run one operation at a time, in transformers' own PyTorch code where no kernels are installed. What they
keep for the backward pass follows from that code alone, so the code runs here on the meta device, without data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from lorafit.backbone.architecture import architecture_of, auto_class, decoder_layers, text_decoder
from lorafit.backbone.skeleton.live_bytes import LiveBytes
from lorafit.shapes.recurrence import CHUNKS

DTYPES = {2: torch.bfloat16, 4: torch.float32}
CHUNK = 64
"""Tokens that a row is padded to multiples of, unless config.json says another number."""
CHUNK_KEYS = ("mamba_chunk_size", "chunk_size")
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, NotImplementedError)
"""Errors of code that asks for the data of its tensors, or is called otherwise than expected."""


class _Called(Exception):
    """Raised with the arguments of a module, to skip the rest of the model."""


def recurrent_parts(layer: nn.Module) -> list[nn.Module]:
    """Return the modules of `layer` with a state along the sequence, which their convolution tells.

    A layer whose only convolution is short has none: it compiles like attention.
    """
    holders = [module for module in layer.modules() if any(isinstance(one, nn.Conv1d) for one in module.children())]
    return [module for module in holders if "ShortConv" not in type(module).__name__]


def recurrences_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return each kind of recurrent module of `model`, as JSON-ready `Recurrence`s.

    The list is empty if one of them cannot run without data.
    """
    parts = [part for layer in decoder_layers(model) for part in recurrent_parts(layer)]
    counts = Counter(type(part).__name__ for part in parts)
    architecture = architecture_of(model)
    chunk = next(_chunks(architecture.get_text_config()), CHUNK)
    lengths = [chunk * length for length in CHUNKS]
    found = {}
    try:
        for width, dtype in DTYPES.items() if parts else ():
            mode = FakeTensorMode()
            with mode:
                model = auto_class(architecture).from_config(architecture, dtype=dtype)
            found[width] = _sizes(model, lengths, mode)
    except ERRORS:
        return []
    return [
        {
            "count": count,
            "chunk": chunk,
            "kept": {width: found[width][kind][0] for width in found},
            "peaks": {width: found[width][kind][1] for width in found},
        }
        for kind, count in counts.items()
    ]


def _chunks(text: Any) -> Iterator[int]:
    values = (getattr(text, key, None) for key in CHUNK_KEYS)
    yield from (value for value in values if isinstance(value, int) and value > 0)


def _sizes(model: nn.Module, lengths: Sequence[int], mode: FakeTensorMode) -> dict[str, tuple[list[int], list[int]]]:
    """Return, for each kind of recurrent module, the bytes kept and the peak of a row of each length."""
    firsts: dict[str, tuple[nn.Module, nn.Module]] = {}
    for layer in decoder_layers(model):
        for part in recurrent_parts(layer):
            firsts.setdefault(type(part).__name__, (layer, part))
    found = {}
    for kind, (layer, part) in firsts.items():
        sizes = []
        for tokens in lengths:
            with mode:
                call = _arguments(model, layer, part, tokens)
            sizes.append(_count(part, call))
        found[kind] = [kept for kept, _ in sizes], [peak for _, peak in sizes]
    return found


def _arguments(
    model: nn.Module, layer: nn.Module, part: nn.Module, tokens: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which `model` calls `part` for one row of `tokens`. Other layers are passed by."""

    def called(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        raise _Called(args, options)

    others: list[Any] = [one for one in decoder_layers(model) if one is not layer]
    ids = torch.zeros(1, tokens, dtype=torch.long, device="cpu")
    hook = part.register_forward_pre_hook(called, with_kwargs=True)
    for passed in (_alone, _in_tuple):
        for other in others:
            other.forward = passed
        try:
            with torch.no_grad():
                text_decoder(model)(input_ids=ids, use_cache=False)
        except _Called as call:
            hook.remove()
            return call.args[0], call.args[1]
        except ERRORS:
            continue
        finally:
            for other in others:
                del other.forward
    hook.remove()
    raise ValueError(f"{type(part).__name__} was not called")


def _alone(hidden_states: Any, *unused: Any, **options: Any) -> Any:
    return hidden_states


def _in_tuple(hidden_states: Any, *unused: Any, **options: Any) -> Any:
    return (hidden_states,)


def _count(part: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[int, int]:
    """Return the bytes that `part` keeps for its backward pass, and the peak of both passes."""
    args, options = tree_map_only(torch.Tensor, _leaf, call)
    own = {name: _bare(tensor) for name, tensor in (*part.named_parameters(), *part.named_buffers())}
    held = [value for value in tree_leaves((args, options)) if isinstance(value, torch.Tensor)]
    with LiveBytes([*held, *own.values()]) as live:
        out = tree_leaves(functional_call(part.train(), own, args, options))
        out = [value for value in out if isinstance(value, torch.Tensor) and value.requires_grad]
        kept = live.now - sum(value.untyped_storage().nbytes() for value in out)
        torch.autograd.backward(out, [torch.empty_like(value) for value in out])
        return kept, live.peak


def _bare(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor like `tensor` on the meta device, which is faster there than a fake one."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return _bare(tensor).requires_grad_(tensor.is_floating_point())
