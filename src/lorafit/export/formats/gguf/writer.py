"""writer: write one GGUF file from merged weights and the folder beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from torch import Tensor
from transformers import AutoConfig

from lorafit.export.formats.export_format import Written
from lorafit.export.formats.gguf.architecture import Architecture
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
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    architecture = Architecture(config)
    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    architecture.write_settings(writer)
    write_vocabulary(writer, folder, config.vocab_size)
    spool = folder / SPOOL
    try:
        total = _encode_all(writer, weights, architecture, quantization, spool, importance or {})
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
        spool.unlink(missing_ok=True)
    return Written((path,), total)


def require_written(folder: Path) -> None:
    """Raise UsageError for a base in `folder` whose model or tokenizer is not written here."""
    Architecture(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if (folder / "tokenizer.json").is_file():
        require_vocabulary(folder)


def _encode_all(
    writer: gguf.GGUFWriter,
    weights: Iterable[tuple[str, Tensor]],
    architecture: Architecture,
    quantization: str,
    spool: Path,
    importance: Mapping[str, np.ndarray],
) -> int:
    """Encode every tensor into `spool`, and name it in `writer`; return the bytes of all."""
    tied, pieces = bool(getattr(architecture.config, "tie_word_embeddings", False)), []
    with spool.open("wb") as out:
        for name, stored, values in _named(weights, architecture, tied):
            kind = type_of(stored, values.shape, quantization, architecture.layers, tied)
            data = np.ascontiguousarray(encode(values, kind, importance.get(name)))
            pieces.append(_Piece(stored, kind, data.dtype, data.shape, out.tell()))
            data.tofile(out)
        total = out.tell()
    for piece in pieces:
        data = np.memmap(spool, piece.dtype, "r", piece.offset, piece.shape)
        writer.add_tensor(piece.name, data, raw_dtype=piece.kind)
    return total


class _Piece(NamedTuple):
    """Place one encoded tensor in the spool: `offset` in bytes."""

    name: str
    kind: gguf.GGMLQuantizationType
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def _named(
    weights: Iterable[tuple[str, Tensor]], architecture: Architecture, tied: bool
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (name, name in the file, fp32 values) of every tensor but a tied head, for which the embeddings serve."""
    for name, tensor in weights:
        if not (tied and name == "lm_head.weight"):
            yield name, *architecture.tensor(name, tensor.float().cpu().numpy())
    yield from (("", stored, values) for stored, values in architecture.extra_tensors().items())
