"""llama_cpp: llama.cpp's C functions in the library that the package `xllamacpp` brings.

The only module that knows the library. Structures that llama.cpp passes by value are taken as opaque bytes, larger than
any release has made them; the few fields that are set lie first, and are read back through llama.cpp's own functions.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.errors import VerificationError
from lorafit.export.formats.export_format import Row

CHUNK = 512
"""Tokens of one call of llama_decode."""


class _Parameters(ctypes.Structure):
    """Hold llama_model_params or llama_context_params; of the latter the first fields are n_ctx, n_batch, n_ubatch."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 2036),
    )


class _Batch(ctypes.Structure):
    """Mirror llama_batch: tokens with positions, sequences, and whether their logits are wanted."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


@_LOG
def _discard(level: int, text: bytes, data: int) -> None:
    """Take llama.cpp's log lines, which would go to the terminal."""


FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
    "llama_backend_init": (None, []),
    "llama_model_default_params": (_Parameters, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _Parameters]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_context_default_params": (_Parameters, []),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _Parameters]),
    "llama_n_batch": (ctypes.c_uint32, [ctypes.c_void_p]),
    "llama_adapter_lora_init": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p]),
    "llama_set_adapters_lora": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)],
    ),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p, ctypes.c_int32]),
    "llama_tokenize": (
        ctypes.c_int32,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, *[ctypes.c_bool] * 2],
    ),
}
"""Result and arguments of every function used, by llama.h and ggml.h of 2026."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return llama.cpp's library with its functions typed. Raises VerificationError if a function is gone."""
    spec = importlib.util.find_spec("xllamacpp.xllamacpp")
    assert spec is not None and spec.origin is not None, "the format asks for the package first"
    loaded = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in FUNCTIONS.items():
        if not hasattr(loaded, name):
            what = f"this release of xllamacpp has no function {name}"
            raise VerificationError(what, where=spec.origin, fix="pip install 'xllamacpp==2026.10.*'")
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    loaded.llama_log_set(_discard, None)
    loaded.llama_backend_init()
    return loaded


def quantize_rows(values: np.ndarray, kind: int, importance: np.ndarray | None = None) -> np.ndarray:
    """Return fp32 `values` (rows, columns) quantized by llama.cpp to the ggml type `kind`.

    The result is bytes (rows, bytes a row). `importance` (columns,) weighs the errors of each row.
    """
    rows, columns = values.shape
    source = np.ascontiguousarray(values, dtype=np.float32)
    weights = None if importance is None else np.ascontiguousarray(importance, dtype=np.float32)
    assert weights is None or weights.shape == (columns,), "importance of other columns"
    encoded = np.empty((rows, library().ggml_row_size(int(kind), columns)), dtype=np.uint8)
    address = None if weights is None else weights.ctypes.data
    to = (source.ctypes.data, encoded.ctypes.data)
    written = library().ggml_quantize_chunk(int(kind), *to, 0, rows, columns, address)
    assert written == encoded.nbytes, "llama.cpp wrote another number of bytes than it said"
    return encoded


class LlamaCppModel:
    """Hold a GGUF file opened by llama.cpp. It implements `OpenedModel`."""

    def __init__(self, model: int, path: Path, adapter: int | None = None) -> None:
        self._model, self._path, self._adapter = model, path, adapter
        self._vocabulary = library().llama_model_get_vocab(model)
        self.vocabulary_size = int(library().llama_vocab_n_tokens(self._vocabulary))

    @classmethod
    @contextmanager
    def load(cls, path: Path, adapter: Path | None = None) -> Iterator[LlamaCppModel]:
        """Load `path` within the block, and the LoRA file `adapter` over it.

        Raises VerificationError if llama.cpp refuses a file.
        """
        model = library().llama_model_load_from_file(str(path).encode(), library().llama_model_default_params())
        if not model:
            raise VerificationError("llama.cpp does not load the file", where=str(path), fix="report this base")
        try:
            yield cls(model, path, None if adapter is None else _adapter_of(model, adapter))
        finally:  # which frees the adapter too
            library().llama_model_free(model)

    def log_probabilities(self, row: Row) -> Tensor:
        """Return log-probabilities (positions, vocabulary) at `row.predicting`, in fp32; the row runs alone."""
        with self._context(len(row.ids)) as context:
            logits = self._logits(context, np.asarray(row.ids, dtype=np.int32), row.predicting)
        return torch.from_numpy(logits).log_softmax(-1)

    def tokenize(self, text: str) -> list[int]:
        """Return llama.cpp's ids of a rendered prompt: special tokens by their text, and none added."""
        raw = text.encode()
        ids = np.empty(len(raw) + 16, dtype=np.int32)
        count = library().llama_tokenize(self._vocabulary, raw, len(raw), ids.ctypes.data, len(ids), False, True)
        return [int(each) for each in ids[:count]]

    @contextmanager
    def _context(self, tokens: int) -> Iterator[int]:
        parameters = library().llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = tokens, CHUNK, CHUNK
        context = library().llama_init_from_model(self._model, parameters)
        if not context:
            raise VerificationError("llama.cpp cannot run the file", where=str(self._path), fix="report this base")
        try:
            assert library().llama_n_batch(context) <= CHUNK, "llama_context_params begins with other fields"
            if self._adapter is not None:
                adapters, scales = (ctypes.c_void_p * 1)(self._adapter), (ctypes.c_float * 1)(1.0)
                refused = library().llama_set_adapters_lora(context, adapters, 1, scales)
                assert not refused, "llama.cpp refuses an adapter that it has loaded"
            yield context
        finally:
            library().llama_free(context)

    def _logits(self, context: int, ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return logits (wanted, vocabulary) of `ids`, decoded in chunks from the first token on."""
        logits = np.empty((len(wanted), self.vocabulary_size), dtype=np.float32)
        filled = 0
        for start in range(0, len(ids), CHUNK):
            chunk = ids[start : start + CHUNK]
            here = wanted[(wanted >= start) & (wanted < start + CHUNK)] - start
            self._decode(context, chunk, start, here)
            for position in here:
                found = library().llama_get_logits_ith(context, int(position))
                logits[filled] = np.ctypeslib.as_array(found, (self.vocabulary_size,))
                filled += 1
        return logits

    def _decode(self, context: int, ids: np.ndarray, start: int, wanted: np.ndarray) -> None:
        count, pointer = len(ids), ctypes.POINTER(ctypes.c_int32)
        numbers = ctypes.c_int32 * count
        sequence = ctypes.cast((ctypes.c_int32 * 1)(0), pointer)
        flags = np.zeros(count, dtype=np.int8)
        flags[wanted] = 1
        batch = _Batch(
            n_tokens=count,
            token=numbers(*ids.tolist()),
            pos=numbers(*range(start, start + count)),
            n_seq_id=numbers(*[1] * count),
            seq_id=(pointer * count)(*[sequence] * count),
            logits=flags.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        if library().llama_decode(context, batch):
            raise VerificationError("llama.cpp failed on a row", where=str(self._path), fix="report this base")


def _adapter_of(model: int, path: Path) -> int:
    """Return llama.cpp's handle of the LoRA file `path` over `model`. Raises VerificationError if it is refused."""
    adapter = library().llama_adapter_lora_init(model, str(path).encode())
    if not adapter:
        raise VerificationError("llama.cpp does not load the adapter", where=str(path), fix="report this base")
    return int(adapter)
