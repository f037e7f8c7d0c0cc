"""principal: adapters that begin as a part of their weight (PiSSA, OLoRA), over a base that stays as it is.

PEFT takes the initial product B₀ A₀ out of the base, which is then another base. Here the adapter adds
`scale · ((B₀ + ΔB)(A₀ + ΔA) - B₀ A₀)`, of which ΔA and ΔB train: the gradients are PEFT's. What it adds is a plain
LoRA of twice the rank, `[ΔB, B₀] @ [A₀ + ΔA; ΔA]`, and adapter folders hold that one. No term of it is a difference
of large numbers, so 16 bits lose no update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lorafit.backbone import redirect_library_logs
from lorafit.errors import AdapterError

with redirect_library_logs():
    from peft.tuners.lora.layer import LoraLayer, LoraVariant

INITIAL_FILE = "initial_product.safetensors"
"""A₀ and B₀ of every target, from which a resumed run goes on bit by bit. PEFT does not read it."""


class PrincipalVariant(LoraVariant):
    """Compute and merge the change of an initial product, in PEFT's layers."""

    @staticmethod
    def init(module: Any, adapter_name: str, **unused: Any) -> None:
        """Do nothing: `begin_with_product` sets the layer."""

    @staticmethod
    def forward(module: Any, *, active_adapter: str, x: Tensor, result: Tensor, **unused: Any) -> Tensor:
        """Return `result` (…, out), the base's output, plus the change of the product on `x` (…, in)."""
        a, b = plain_factors(module, active_adapter)
        low = F.linear(module.lora_dropout[active_adapter](x), a)
        return result + F.linear(low, b) * module.scaling[active_adapter]

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it is stored, plus the change."""
        return orig_weight + dense_change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Add the change to the weight as it is stored."""
        orig_weight.data += dense_change(module, active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it is stored, without the change."""
        return orig_weight - dense_change(module, active_adapter).to(orig_weight.dtype)


def is_principal(layer: Any, name: str) -> bool:
    """Return True if the adapter `name` of `layer` has an initial product."""
    return isinstance(layer.lora_variant.get(name), PrincipalVariant)


@torch.no_grad()
def begin_with_product(layer: Any, name: str, a: Tensor, b: Tensor) -> None:
    """Let the adapter `name` of `layer` train the change of B₀ A₀, given A₀ (r, in) and B₀ (out, r) in fp32."""
    layer.lora_variant[name] = PrincipalVariant()
    layer.register_buffer("initial_a", a, persistent=False)
    layer.register_buffer("initial_b", b, persistent=False)
    for side in (layer.lora_A, layer.lora_B):
        side[name].weight.zero_()


def plain_factors(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return A (2 r, in) and B (out, 2 r) of the plain LoRA that the adapter `name` adds."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return torch.cat((layer.initial_a + a, a)), torch.cat((b, layer.initial_b), 1)


def dense_change(layer: Any, name: str) -> Tensor:
    """Return the change of a weight by the adapter `name`, as it is stored: (out, in), or transposed for Conv1D."""
    a, b = (side.detach() for side in plain_factors(layer, name))
    dense = (b @ a) * layer.scaling[name]
    return dense.T if layer.fan_in_fan_out else dense


def principal_layers(adapted: nn.Module, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, layer) of the layers of `adapted` whose adapter `name` has an initial product."""
    for path, module in adapted.named_modules():
        if isinstance(module, LoraLayer) and is_principal(module, name):
            yield path, module


@torch.no_grad()
def restore_product(layer: Any, name: str, plain: tuple[Tensor, Tensor], initial: tuple[Tensor, Tensor]) -> None:
    """Set the adapter `name` of `layer` to the plain factors of a file and the initial product beside it.

    Raises ValueError for other shapes.
    """
    (a, b), rank = plain, len(layer.initial_a)
    pairs = (
        (layer.lora_A[name].weight, a[rank:]),
        (layer.lora_B[name].weight, b[:, :rank]),
        (layer.initial_a, initial[0]),
        (layer.initial_b, initial[1]),
    )
    for live, saved in pairs:
        if live.shape != saved.shape:
            raise ValueError(f"{tuple(saved.shape)} is not {tuple(live.shape)}")
        live.copy_(saved)


def initial_tensors(adapted: nn.Module, name: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of INITIAL_FILE, on the host: `MODULE.A` and `MODULE.B`, modules without `prefix`."""
    found = {}
    for path, layer in principal_layers(adapted, name):
        for side, tensor in (("A", layer.initial_a), ("B", layer.initial_b)):
            found[f"{path.removeprefix(prefix)}.{side}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return found


def read_initial(folder: Path, modules: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A₀ and B₀ of each of `modules` in the INITIAL_FILE of `folder`. Raises AdapterError."""
    path = folder / INITIAL_FILE
    try:
        tensors = load_file(path)
        return {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in modules}
    except (SafetensorError, OSError, KeyError) as error:
        what = "the initial product of the adapter is missing or unreadable"
        raise AdapterError(what, where=str(path), fix="resume from another checkpoint") from error
