"""Full: every weight as a training method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafit.backbone import load_backbone, output_head, text_decoder
from lorafit.config import RunConfig
from lorafit.errors import AdapterError
from lorafit.methods.full.in_backward import PAGED, StepInBackward, updates_in_backward
from lorafit.methods.full.in_fp8 import multiply_in_fp8
from lorafit.methods.full.optimizer import optimizer_of
from lorafit.methods.full.sharded_folder import ShardsSnapshot, processes_of, restore_shards, take_shards
from lorafit.methods.full.sharding import is_sharded
from lorafit.methods.full.weights_folder import CONFIG_FILE, WeightsSnapshot, WholeWeights, put_weights
from lorafit.methods.saving import require_finite, save_snapshot


class Full:
    """Train every weight of the decoder and its head. The class implements `lorafit.methods.Method`.

    A tower for images or audio stays frozen: text rows give it no gradient.
    """

    name = "full"

    def describe(self, config: RunConfig) -> str:
        """Return the method in a few words."""
        return "Full fine-tuning"

    def prepare(self, model: nn.Module, config: RunConfig, targets: tuple[str, ...] | None = None) -> nn.Module:
        """Return `model` with every weight trainable; with `compute: fp8` its linears multiply in FP8.

        Raises AdapterError for a quantized base.
        """
        model.requires_grad_(False)
        for name, weight in _weights(model).items():
            if not weight.is_floating_point():
                raise AdapterError(
                    f"{name} is quantized, so it cannot be trained", where="base", fix="choose the 16-bit checkpoint"
                )
            weight.requires_grad_(True)
        if config.compute == "fp8":
            multiply_in_fp8(model)
        return _of_base(model, config)

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the trained weights in module order; a tied head is listed once."""
        return [weight for weight in model.parameters() if weight.requires_grad]

    def learning_rate_factor(self, name: str, config: RunConfig) -> float:
        """Return 1: all weights have the same learning rate."""
        return 1.0

    def optimizer(self, kind: type, groups: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        """Return the optimizer; 16-bit weights get fp32 master copies, or stochastic rounding with 8-bit moments.

        With paged moments they are updated within the backward pass.
        """
        weights = [weight for group in groups for weight in group["params"]]
        if options.get("is_paged") and updates_in_backward(PAGED, weights):
            return StepInBackward(kind, groups, options)
        return optimizer_of(kind, groups, options)

    def snapshot(self, model: nn.Module, config: RunConfig) -> WeightsSnapshot | ShardsSnapshot:
        """Copy every weight to the host, in its own precision; of a sharded model this process's shards."""
        return ShardsSnapshot.of(model) if is_sharded(model) else WeightsSnapshot.of(model)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the weights in `folder`, left by any number of processes, into `model`.

        Raises AdapterError if they do not fit.
        """
        if processes_of(folder) > 1:
            restore_shards(model, folder)
            return
        own = _config_of(model).model_copy(update={"base": str(folder), "revision": None})
        saved = load_backbone(own, device="cpu", exact=True)
        if is_sharded(model):
            take_shards(model, saved, folder)
            return
        put_weights(model, dict(saved.named_parameters()), str(folder))

    def save(
        self, model: nn.Module, folder: Path, config: RunConfig, *, written: Callable[[Path], None] | None = None
    ) -> None:
        """Write a Hugging Face model to `folder`, completely or not at all.

        The shards of several processes are gathered first; all others call `WeightsSnapshot.gathered` meanwhile.
        """
        snapshot = WeightsSnapshot.of(model) if not is_sharded(model) else WeightsSnapshot.gathered(model)
        save_snapshot(snapshot, folder, written)

    def load(self, model: nn.Module, folder: Path, config: RunConfig) -> nn.Module:
        """Return the model in `folder`, frozen, on the device of `model`. Raises AdapterError, BackboneError."""
        own = config.model_copy(update={"base": str(folder), "revision": None})
        tuned = load_backbone(own, device=next(model.parameters()).device, exact=True)
        require_finite(dict(tuned.named_parameters()), folder, "the model is not loaded")
        return _of_base(tuned, config)

    def detach(self, model: Any) -> nn.Module:
        """Return `model` with the weights of its base, frozen."""
        put_weights(model, _base_weights(model), _config_of(model).base)
        frozen: nn.Module = model.requires_grad_(False)
        return frozen

    @contextmanager
    def without(self, model: Any) -> Iterator[None]:
        """Give `model` the weights of its base within the block.

        They are read from disk once, and stay in host memory beside the trained ones.
        """
        base = _base_weights(model)
        tuned = {name: weight.detach().to("cpu", copy=True) for name, weight in model.named_parameters()}
        put_weights(model, base, _config_of(model).base)
        try:
            yield
        finally:
            put_weights(model, tuned, _config_of(model).base)

    def trained_weights(self, folder: Path, config: RunConfig) -> WholeWeights:
        """Open the weights in `folder`. Raises VerificationError if they are the base's own."""
        return WholeWeights.open(folder, config)

    def is_finished(self, folder: Path) -> bool:
        """Return True if `folder` holds a model and its configuration."""
        return (folder / CONFIG_FILE).is_file() and any(folder.glob("*.safetensors"))


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> weight of the decoder and its head; a tied head has the embeddings' name."""
    head = output_head(model)
    parts = [*text_decoder(model).parameters(), *(head.parameters() if head is not None else ())]
    chosen = {id(weight) for weight in parts}
    return {name: weight for name, weight in model.named_parameters() if id(weight) in chosen}


def _of_base(model: Any, config: RunConfig) -> nn.Module:
    """Let `model` know its base, which answers when the trained weights are switched off."""
    model.base_config, model.base_weights = config, None
    known: nn.Module = model
    return known


def _config_of(model: Any) -> RunConfig:
    """Return the settings of the run that `model` belongs to."""
    config: RunConfig = model.base_config
    return config


def _base_weights(model: Any) -> dict[str, Tensor]:
    """Return the base's weights on the host, read from disk at the first call."""
    if model.base_weights is None:
        base = load_backbone(_config_of(model), device="cpu", exact=True)
        model.base_weights = {
            name: weight.detach().to(model.get_parameter(name).dtype) for name, weight in base.named_parameters()
        }
    weights: dict[str, Tensor] = model.base_weights
    return weights
