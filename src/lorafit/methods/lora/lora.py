"""Lora: low-rank adapters as a training method (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from lorafit.config import RunConfig
from lorafit.errors import AdapterError
from lorafit.methods.lora.adapter_folder import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterFiles,
    AdapterSnapshot,
    load_adapter,
    restore_adapter,
    save_adapter,
)
from lorafit.methods.lora.attach import attach
from lorafit.methods.lora.deltas import Deltas
from lorafit.methods.lora.dora import MAGNITUDE
from lorafit.methods.lora.initial.trained import begin_with
from lorafit.methods.lora.token_rows import remove_rows, without_rows
from lorafit.runs import InitialAdapter

NAMES = {"pissa": "PiSSA", "olora": "OLoRA", "loftq": "LoftQ"}
"""The initializations as their papers write them."""


class Lora:
    """Train `scale · B @ A` beside frozen linears. The class implements `lorafit.methods.Method`."""

    name = "lora"

    def describe(self, config: RunConfig) -> str:
        """Return the method with rank and alpha, in a few words."""
        kind = f"{'rs' if config.rslora else ''}{'DoRA' if config.dora else 'LoRA'}"
        kind += "+" if config.loraplus_lr_ratio != 1 else ""
        begun = "" if config.init_lora_weights == "default" else f", begun as {NAMES[config.init_lora_weights]}"
        whole = f"; {' and '.join(config.modules_to_save)} whole" if config.modules_to_save else ""
        return f"{kind} (rank {config.rank}, alpha {config.alpha:g}{begun}{whole})"

    def prepare(self, model: nn.Module, config: RunConfig, targets: tuple[str, ...] | None = None) -> nn.Module:
        """Return `model` with adapters on `targets` (default: `config.targets`) and a frozen base.

        They are fresh, or have the weights of `config.init_adapter`.
        """
        adapted = attach(model, config, targets)
        if config.init_adapter is not None:
            folder = InitialAdapter.open(config.init_adapter).folder
            _check_settings(folder, config)
            begin_with(adapted, folder)
        return adapted

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the adapters' weights in module order."""
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def learning_rate_factor(self, name: str, config: RunConfig) -> float:
        """Return LoRA+'s ratio for B and DoRA's magnitudes, 1 for A (Hayou et al., arXiv:2402.12354)."""
        return config.loraplus_lr_ratio if ".lora_B." in name or f".{MAGNITUDE}." in name else 1.0

    def optimizer(self, kind: type, groups: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        """Return `kind` over the adapters' weights, which are in fp32."""
        return kind(groups, **options)

    def snapshot(self, model: Any, config: RunConfig) -> AdapterSnapshot:
        """Copy the adapter of `model` to the host, in fp32."""
        return AdapterSnapshot.of(model, config, base_name=config.base)

    def restore(self, model: Any, folder: Path) -> None:
        """Copy the adapter in `folder` into the adapter of `model`."""
        restore_adapter(model, folder)

    def save(
        self, model: Any, folder: Path, config: RunConfig, *, written: Callable[[Path], None] | None = None
    ) -> None:
        """Write the adapter to `folder` in PEFT's format, completely or not at all."""
        save_adapter(model, folder, config, base_name=config.base, written=written)

    def load(self, model: nn.Module, folder: Path, config: RunConfig) -> nn.Module:
        """Return `model` with the adapter in `folder`, frozen. Raises AdapterError unless `config` describes it."""
        _check_settings(folder, config)
        return load_adapter(model, folder)

    def detach(self, model: Any) -> nn.Module:
        """Return the base within `model`, with its original linears."""
        base: nn.Module = model.unload()
        remove_rows(base, keep=False)
        return base

    def without(self, model: Any) -> AbstractContextManager[Any]:
        """Disable the adapter of `model` within the block."""
        switched_off = ExitStack()
        switched_off.enter_context(model.disable_adapter())
        switched_off.enter_context(without_rows(model.get_base_model()))
        return switched_off

    def trained_weights(self, folder: Path, config: RunConfig) -> Deltas:
        """Open the deltas of the adapter in `folder`. Raises AdapterError unless `config` describes it."""
        _check_settings(folder, config)
        return Deltas.from_folder(folder, config)

    def is_finished(self, folder: Path) -> bool:
        """Return True if `folder` holds an adapter's weights and configuration."""
        return all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def _check_settings(folder: Path, config: RunConfig) -> None:
    """Raise AdapterError if rank or scale of the files differ from the run's settings."""
    files = AdapterFiles.open(folder)
    if files.dora != config.dora:
        kinds = {True: "DoRA", False: "LoRA"}
        what = f"the adapter is {kinds[files.dora]}, but the run was trained with {kinds[config.dora]}"
        raise AdapterError(what, where=str(folder), fix=f"restore {CONFIG_FILE}")
    for words, has, wants in (
        ("trained rows of tokens", bool(files.tokens), bool(config.trainable_tokens)),
        ("modules that were trained whole", bool(files.tables), bool(config.modules_to_save)),
    ):
        if has != wants:
            theirs, ours = (words if one else f"no {words}" for one in (has, wants))
            what = f"the adapter has {theirs}, but the run {ours}"
            raise AdapterError(what, where=str(folder), fix=f"restore {CONFIG_FILE}")
    trained = {"rank": config.stored_rank, "scale": config.scale}
    for name, found in (("rank", files.rank), ("scale", files.scale)):
        if not math.isclose(found, trained[name], rel_tol=1e-6):
            what = f"the adapter has {name} {found:g}, but the run was trained with {trained[name]:g}"
            raise AdapterError(what, where=str(folder), fix=f"restore {CONFIG_FILE}")
