"""Method: the protocol of training methods. LoRA and full fine-tuning implement it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from lorafit.config import RunConfig


class MethodSnapshot(Protocol):
    """Hold trained weights of one moment on the host. Training continues while they are written."""

    @property
    def size_bytes(self) -> int:
        """Return the bytes of all tensors."""
        ...

    def require_finite(self, where: Path) -> None:
        """Raise AdapterError if a weight is NaN or infinite. The message names `where`."""
        ...

    def write(self, folder: Path) -> None:
        """Write the weights into `folder`, which exists and is empty."""
        ...


class TrainedWeights(Protocol):
    """Hold the trained weights of a run as changes of the base's parameters."""

    def __len__(self) -> int:
        """Return the number of trained base parameters."""
        ...

    def source(self, config: RunConfig) -> RunConfig:
        """Return the settings whose base holds the tensors to merge into: `config`, or a whole trained model."""
        ...

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """Return the trained value of the base's parameter `name`, given its base value `weight`.

        Sums are made in fp32 and rounded once, to the dtype of `weight`. An untrained parameter is returned unchanged.
        """
        ...

    def check_found(self, names: Iterable[str]) -> None:
        """Raise VerificationError unless every trained parameter is among `names`."""
        ...


class Method(Protocol):
    """Train a base in one way. A method has no state: its functions get the model and the settings."""

    name: str
    """The value of the setting that chooses this method."""

    def describe(self, config: RunConfig) -> str:
        """Return the method and its settings in a few words, for a model card."""
        ...

    def prepare(self, model: nn.Module, config: RunConfig, targets: tuple[str, ...] | None = None) -> nn.Module:
        """Return `model` with fresh trainable weights, drawn from `config.seed`. All other weights are frozen."""
        ...

    def trainable(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the optimizer's parameters in a fixed order."""
        ...

    def learning_rate_factor(self, name: str, config: RunConfig) -> float:
        """Return the factor of the learning rate for the parameter `name` of the model."""
        ...

    def optimizer(self, kind: type, groups: Sequence[dict[str, Any]], options: Mapping[str, Any]) -> Any:
        """Return the optimizer of class `kind` over the trained weights in `groups`."""
        ...

    def snapshot(self, model: nn.Module, config: RunConfig) -> MethodSnapshot:
        """Copy the trained weights of `model` to the host."""
        ...

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Copy the weights in `folder` into `model`.

        This is the inverse of `snapshot(...).write(folder)`.
        """
        ...

    def save(
        self, model: nn.Module, folder: Path, config: RunConfig, *, written: Callable[[Path], None] | None = None
    ) -> None:
        """Write the trained weights to `folder`, completely or not at all.

        `written` is called with the staged folder before it gets its name.
        """
        ...

    def load(self, model: nn.Module, folder: Path, config: RunConfig) -> nn.Module:
        """Return the base `model` with the weights in `folder`, frozen and checked against `config`."""
        ...

    def detach(self, model: nn.Module) -> nn.Module:
        """Return the base within `model`, without trained weights.

        This is the inverse of `prepare` and of `load`.
        """
        ...

    def without(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Disable the trained weights of `model` within the block."""
        ...

    def trained_weights(self, folder: Path, config: RunConfig) -> TrainedWeights:
        """Open the weights in `folder`, checked against `config`.

        Raises AdapterError for untrusted files, VerificationError for weights that were not trained.
        """
        ...

    def is_finished(self, folder: Path) -> bool:
        """Return True if `folder` holds every file that `save` writes."""
        ...
