"""Gguf: the export format of llama.cpp. One file holds weights, tokenizer, chat template and stop tokens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import UsageError
from lorafit.export.formats.export_format import Row, Written

if TYPE_CHECKING:
    from lorafit.export.formats.gguf.llama_cpp import LlamaCppModel

BITS = {"f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9}
"""Bits of each weight on average, by the name of the quantization."""
LOSSY = frozenset({"q6_k", "q5_k_m", "q4_k_m"})
"""Quantizations that change the model by more than the noise of 16-bit serving."""


@dataclass(frozen=True)
class Gguf:
    """Write and open GGUF files. It implements `ExportFormat`.

    Attributes:
        quantization: a key of BITS; the K-quants mix types over the tensors as llama.cpp's own tool does.
        importance: base's name of a weight -> importance of its columns (in,), by which K-quants weigh their errors.
    """

    quantization: str
    importance: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False, kw_only=True)
    library_name = "gguf"

    @property
    def name(self) -> str:
        """Return the name that chooses this format."""
        return f"gguf-{self.quantization}"

    @property
    def file(self) -> str:
        """Return the name of the file, as llama.cpp's users write it."""
        return f"model-{self.quantization.upper()}.gguf"

    @property
    def dtype(self) -> torch.dtype:
        """Return the 16-bit precision whose rounding is this file's noise floor: 8 bits round about as bf16 does."""
        return torch.float16 if self.quantization == "f16" else torch.bfloat16

    @property
    def bytes_per_weight(self) -> float:
        """Return the bytes on disk of each weight while the file is written: encoded once aside, once in the file."""
        return 2 * BITS[self.quantization] / 8

    @property
    def lossy(self) -> bool:
        """Return True if verification judges the file as a quantization, and not as a copy."""
        return self.quantization in LOSSY

    def require_base(self, folder: Path) -> None:
        """Raise UsageError if a package is missing, or for a base in `folder` that llama.cpp has no place for."""
        self.require_packages("gguf", "xllamacpp")
        from lorafit.export.formats.gguf.writer import require_written  # its packages are optional

        require_written(folder)

    def require_rows(self, folder: Path, rows: Sequence[Row]) -> None:
        """Raise UsageError for a row that is longer than llama.cpp attends to as the base in `folder` does."""
        from lorafit.export.formats.gguf.writer import require_context  # its packages are optional

        require_context(folder, max((len(row.ids) for row in rows), default=0))

    def write(self, weights: Iterable[tuple[str, Tensor]], folder: Path) -> Written:
        """Write `weights` to one file in `folder`, beside the configuration and the tokenizer it is made from.

        Raises UsageError if a package is missing, or for a model or tokenizer that llama.cpp has no name for here.
        """
        self.require_packages("gguf", *(["xllamacpp"] if self.lossy else []))
        from lorafit.export.formats.gguf.writer import write_gguf  # its packages are optional

        return write_gguf(weights, folder / self.file, self.quantization, self.importance)

    @contextmanager
    def open(self, folder: Path, device: torch.device, compute: torch.dtype) -> Iterator[LlamaCppModel]:
        """Load the file with llama.cpp on the CPU; `device` and `compute` are the live model's and not used."""
        self.require_packages("xllamacpp")
        from lorafit.export.formats.gguf.llama_cpp import LlamaCppModel  # its package is optional

        with LlamaCppModel.load(folder / self.file) as model:
            yield model

    def tokenize(self, folder: Path, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids that llama.cpp gives each of the rendered `texts`, with the file in `folder`."""
        with self.open(folder, torch.device("cpu"), torch.float32) as model:
            return [model.tokenize(text) for text in texts]

    def require_packages(self, *names: str) -> None:
        """Raise UsageError with the command that installs those of the packages `names` that are missing."""
        if missing := [name for name in names if importlib.util.find_spec(name) is None]:
            what = f"{self.name} needs the package{'s' * (len(missing) > 1)} {' and '.join(missing)}"
            raise UsageError(what, where="export_format", fix=f"pip install {' '.join(missing)}")


GGUF_FORMATS: dict[str, Gguf] = {form.name: form for form in map(Gguf, BITS)}
"""Every GGUF format by its name."""
