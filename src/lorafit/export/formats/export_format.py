"""ExportFormat: the protocol of model file formats. Safetensors implements it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from lorafit.engine import logits_at


class Row(NamedTuple):
    """Hold one tokenized row.

    Attributes:
        ids: Token ids (tokens,).
        mask: Booleans (tokens,); True marks a supervised token.
    """

    ids: np.ndarray
    mask: np.ndarray

    @property
    def predicting(self) -> np.ndarray:
        """Return the positions whose logits predict a supervised token: the position before it."""
        supervised = np.flatnonzero(np.asarray(self.mask, dtype=bool))
        return supervised[supervised > 0] - 1

    @property
    def targets(self) -> Tensor:
        """Return the supervised token ids (positions,), in the order of `predicting`."""
        return torch.as_tensor(np.asarray(self.ids, dtype=np.int64)[self.predicting + 1])


class OpenedModel(Protocol):
    """Hold a model in the program that runs it, and return its probabilities."""

    def log_probabilities(self, row: Row) -> Tensor:
        """Return log-probabilities (positions, vocabulary) at `row.predicting`, in fp32 on the CPU."""
        ...


@runtime_checkable
class TellsTop(Protocol):
    """Mark an OpenedModel that tells the most likely tokens only; the others are -inf in its log-probabilities."""

    @property
    def told_tokens(self) -> int:
        """Return how many tokens it tells at each position."""
        ...


@dataclass(frozen=True)
class Written:
    """Hold the weight files of an export.

    Attributes:
        files: Paths, in order.
        total_bytes: Bytes of all tensors.
    """

    files: tuple[Path, ...]
    total_bytes: int


class ExportFormat(Protocol):
    """Write and open one format of model files. `verify` measures every format by the result of `open`."""

    @property
    def name(self) -> str:
        """Return the name that chooses this format."""
        ...

    @property
    def library_name(self) -> str:
        """The library that loads the files, as a hub names it; the model card says so."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Return the precision in which the weights are served."""
        ...

    @property
    def bytes_per_weight(self) -> float:
        """Return the bytes on disk of each weight."""
        ...

    @property
    def lossy(self) -> bool:
        """Return True if the weights have fewer than 8 bits; verification then measures by the adapter's effect."""
        ...

    def write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> Written:
        """Write `weights` to `folder`, one in memory at a time.

        Floating-point tensors come in fp32, and the format rounds each once. A tied head may be missing. `folder`
        already holds config.json, the tokenizer and the chat template.
        """
        ...

    def open(self, folder: Path, device: torch.device, compute: torch.dtype) -> AbstractContextManager[OpenedModel]:
        """Load the written model in `folder` within the block, as it will be served.

        `device` and `compute` are the live model's device and precision.
        """
        ...


@runtime_checkable
class OwnTokenizer(Protocol):
    """Tokenize prompts as the program that serves the format does, which has a tokenizer of its own."""

    def tokenize(self, folder: Path, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids that the program gives each of the rendered `texts`, with the export in `folder`."""
        ...


@dataclass(frozen=True)
class TransformersModel:
    """Wrap a transformers model, with or without PEFT, as an OpenedModel."""

    model: nn.Module

    def log_probabilities(self, row: Row) -> Tensor:
        """Return log-probabilities (positions, vocabulary) at `row.predicting`, in fp32 on the CPU.

        The row runs alone and unpadded, so that no other row affects the numbers.
        """
        log_probs: Tensor = logits_at(self.model, row.ids, row.predicting).float().log_softmax(-1).cpu()
        return log_probs
