"""writer: write one GGUF file from merged weights and the folder beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
from torch import Tensor
from transformers import AutoConfig

from lorafit.errors import UsageError, VerificationError
from lorafit.export.formats.export_format import Written
from lorafit.export.formats.gguf.architecture import Architecture
from lorafit.export.formats.gguf.fitting import OTHERWISE
from lorafit.export.formats.gguf.parts import Part
from lorafit.export.formats.gguf.tensor_types import FILE_TYPES, encode, type_of
from lorafit.export.formats.gguf.vocabulary import require_vocabulary, write_vocabulary

SPOOL = ".encoded-tensors"


def write_gguf(
    weights: Iterable[tuple[str, Tensor]],
    path: Path,
    quantization: str,
    importance: Mapping[str, np.ndarray] | None = None,
) -> Written:
    """Write `weights` to the file `path`, one tensor in memory at a time.

    The folder of `path` holds config.json, tokenizer and chat template. `importance` (in,) is that of the columns of
    weights, by their names in `weights`.

    A GGUF file begins with the names and sizes of all tensors, so encoded tensors wait in a file beside it.
    """
    folder = path.parent
    architecture = Architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.write_settings(writer)
    write_vocabulary(writer, folder, architecture.config.vocab_size)
    file = folder / SPOOL
    try:
        with file.open("wb") as out:
            spool = _Spool(out, architecture.experts)
            _encode_all(weights, architecture, quantization, spool, importance or {})
        spool.add_to(writer, file)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        file.unlink(missing_ok=True)
    return Written((path,), spool.total)


def require_written(folder: Path) -> None:
    """Raise UsageError for a base in `folder` whose model or tokenizer is not written here."""
    Architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if (folder / "tokenizer.json").is_file():
        require_vocabulary(folder)


def require_context(folder: Path, tokens: int) -> None:
    """Raise UsageError if rows of `tokens` tokens are longer than the context of a file of the base in `folder`."""
    context = Architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False)).context
    if tokens > context:
        what = f"the run has rows of {tokens:,} tokens, and llama.cpp attends as the model does up to {context:,}"
        raise UsageError(what, where="config.json", fix=OTHERWISE)


def _encode_all(
    weights: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    quantization: str,
    spool: _Spool,
    importance: Mapping[str, np.ndarray],
) -> None:
    """Encode every tensor into `spool`."""
    for name, part in _parts(weights, architecture):
        sizes = (architecture.layers, architecture.tied, architecture.experts)
        kind = type_of(part.name, part.values.shape, quantization, *sizes)
        spool.add(part, kind, np.ascontiguousarray(encode(part.values, kind, importance.get(name))))


def _parts(weights: Iterable[tuple[str, Tensor]], architecture: Architecture) -> Iterator[tuple[str, Part]]:
    """Yield (name of the weight, part of it as the file has it) of every tensor, in fp32."""
    for name, tensor in weights:
        for part in architecture.parts(name, tensor.float().cpu().numpy()):
            yield name, part
    yield from (("", Part(stored, values)) for stored, values in architecture.extra_tensors().items())


@dataclass
class _Piece:
    """Place one encoded tensor in the spool: `offset` in bytes, and the experts of it that are `missing`."""

    kind: gguf.GGMLQuantizationType
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    missing: set[int]


class _Spool:
    """Hold encoded tensors in a file, in which the experts of a tensor lie side by side in whatever order they come."""

    def __init__(self, file: BinaryIO, experts: int) -> None:
        self._file, self._experts = file, experts
        self._pieces: dict[str, _Piece] = {}
        self.total = 0

    def add(self, part: Part, kind: gguf.GGMLQuantizationType, data: np.ndarray) -> None:
        """Write `data`, which is `part` encoded as `kind`."""
        count = 1 if part.expert is None else self._experts
        if part.name not in self._pieces:
            shape = data.shape if part.expert is None else (count, *data.shape)
            self._pieces[part.name] = _Piece(kind, data.dtype, shape, self.total, set(range(count)))
            self.total += count * data.nbytes
        piece, number = self._pieces[part.name], part.expert or 0
        piece.missing.remove(number)
        self._file.seek(piece.offset + number * data.nbytes)
        data.tofile(self._file)

    def add_to(self, writer: gguf.GGUFWriter, file: Path) -> None:
        """Name every tensor of `file` in `writer`. Raises VerificationError if experts are missing."""
        for name, piece in self._pieces.items():
            if piece.missing:
                what = f"the base lacks {len(piece.missing)} of {self._experts} experts of {name}"
                raise VerificationError(what, where="the base", fix="download the base again")
            data = np.memmap(file, piece.dtype, "r", piece.offset, piece.shape)
            writer.add_tensor(name, data, raw_dtype=piece.kind)
