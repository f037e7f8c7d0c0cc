"""lora_file: an adapter as a GGUF file, which llama.cpp adds to a base in another file.

Source: llama.cpp's convert_lora_to_gguf.py, which sends A and B through the converter of the base's family.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
from transformers import AutoConfig

from lorafit.errors import UsageError
from lorafit.export.formats.gguf.architecture import Architecture

MERGE = "export it with --to gguf, which merges"


class LowRank(NamedTuple):
    """Hold the update of one weight: A (r, in) and B (out, r), fp32, and the scale of their product."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def write_lora(updates: Iterable[tuple[str, LowRank]], base: Path, path: Path) -> None:
    """Write the file `path` with `updates`, by the names of the base's weights; `base` has the base's config.json.

    The numbers stay in fp32, as they were trained. Raises UsageError for a weight that llama.cpp cannot adapt.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    architecture, pairs = Architecture(config), dict(updates)
    if architecture.tied and "lm_head.weight" in pairs:
        what = "llama.cpp adapts no head that shares its weights with the embeddings"
        raise UsageError(what, where="lm_head", fix=MERGE)
    # llama.cpp divides one alpha by each pair's own rank
    alpha = max(pair.scale * len(pair.a) for pair in pairs.values())
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (a, b, scale) in pairs.items():
            rest = np.float32(scale * len(a) / alpha)  # 1 if all ranks are equal
            for part in architecture.parts(name, b if rest == 1 else b * rest):
                writer.add_tensor(f"{part.name}.lora_a", np.ascontiguousarray(a))
                writer.add_tensor(f"{part.name}.lora_b", np.ascontiguousarray(part.values))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
