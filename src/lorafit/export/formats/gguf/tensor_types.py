"""tensor_types: which type each tensor of a GGUF file has, and its bytes.

Source of the choice: `llama_tensor_get_type` in llama.cpp's llama-quant.cpp.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from lorafit.export.formats.gguf.llama_cpp import quantize_rows

DEFAULT = {
    "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0, "q6_k": Type.Q6_K, "q5_k_m": Type.Q5_K, "q4_k_m": Type.Q4_K,
}  # fmt: skip
FILE_TYPES = {
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q6_k": gguf.LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": gguf.LlamaFileType.MOSTLY_Q5_K_M,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
WIDER = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
"""The type in place of a K-quant for rows whose length 256 does not divide."""
K_QUANTS = frozenset(WIDER)
SEARCHED = frozenset((Type.Q5_0, Type.Q5_1))
"""Types whose scales llama.cpp searches for, if it is told the importance of columns."""


def type_of(name: str, shape: tuple[int, ...], quantization: str, layers: int, tied: bool, experts: int = 0) -> Type:
    """Return the type of the tensor `name` of the file.

    `shape` is (rows, columns), of one expert too; or (values,) for norms and biases, which stay in fp32 as routers do.
    `tied` is True if the embeddings are the head as well.
    """
    chosen = DEFAULT[quantization]
    if len(shape) == 1 or "_norm" in name or ".ffn_gate_inp" in name or name.endswith(".bias"):
        return Type.F32
    if quantization in ("f16", "bf16"):
        return chosen
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        chosen = Type.Q8_0 if chosen is Type.Q8_0 or shape[-1] % 256 else Type.Q6_K
    elif quantization in ("q5_k_m", "q4_k_m") and ".attn_qkv." in name:
        chosen = Type.Q5_K if quantization == "q4_k_m" else Type.Q6_K
    elif experts == 8 and chosen in K_QUANTS and (".attn_k." in name or ".attn_v." in name):
        chosen = Type.Q8_0  # few bytes beside the experts
    elif experts == 8 and quantization == "q4_k_m" and ".attn_output." in name:
        chosen = Type.Q5_K
    elif quantization in ("q5_k_m", "q4_k_m") and (".attn_v." in name or ".ffn_down" in name):
        layer = int(name.split(".")[1])
        chosen = Type.Q6_K if _use_more_bits(layer, layers) else chosen
    if chosen in K_QUANTS and shape[-1] % 256:
        chosen = WIDER[chosen]
    return Type.F16 if shape[-1] % 32 else chosen


def encode(values: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """Return fp32 `values` (…, columns) as the file stores them: numbers, or bytes (…, bytes a row).

    `importance` (columns,) weighs the errors of types that search for their scales.
    """
    if kind is Type.F32:
        return values
    if kind is Type.F16:
        return values.astype(np.float16)
    if kind in K_QUANTS or (importance is not None and kind in SEARCHED):
        rows = quantize_rows(values.reshape(-1, values.shape[-1]), kind, importance)
        return rows.reshape(*values.shape[:-1], -1)
    return gguf.quants.quantize(values, kind)


def _use_more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
