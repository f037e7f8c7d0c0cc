"""parts: a tensor of a checkpoint, cut or named as llama.cpp's files have it.

A file has the experts of a layer as one tensor (experts, out, in) for gates, ups and downs each. Checkpoints have a
tensor for each expert, or gates and ups together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lorafit.export.formats.gguf.families import Layout

ONE_EXPERT = re.compile(r"(model\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
FUSED = re.compile(r"(model\.layers\.\d+)\.(mlp|block_sparse_moe|shared_mlp)\.(?:experts\.)?(\w+?)(_bias|\.weight)?")
PROJECTIONS = {
    "w1": "gate_proj", "w3": "up_proj", "w2": "down_proj", "output_linear": "down_proj", "input_linear": "gate_up_proj",
}  # fmt: skip
"""Names of the projections of an expert in Mixtral and Granite, in those of the other families."""
LANGUAGE = re.compile(r"^(model\.)?(language_model|text_model)\.(model\.)?")


class Part(NamedTuple):
    """Name values by the checkpoint's name of a whole tensor; `expert` is their place in a tensor of experts."""

    name: str
    values: np.ndarray
    expert: int | None = None


def language_name(name: str) -> str | None:
    """Return the name of a tensor of a model with towers in its language model alone; None for one of a tower."""
    if name.endswith("lm_head.weight"):
        return "lm_head.weight"
    plain = LANGUAGE.sub("model.", name)
    return plain if plain.startswith(("model.layers.", "model.embed_tokens.", "model.norm.")) else None


def parts_of(name: str, values: np.ndarray, layout: Layout, hidden: int) -> Iterator[Part]:
    """Yield the parts of the tensor `name` of a mixture with `hidden` columns.

    A tensor that belongs to no expert is its only part.
    """
    if one := ONE_EXPERT.fullmatch(name):
        layer, number, projection = one.groups()
        yield Part(f"{layer}.mlp.experts.{PROJECTIONS.get(projection, projection)}.weight", values, int(number))
        return
    fused = FUSED.fullmatch(name)
    projection = "" if fused is None else PROJECTIONS.get(fused[3], fused[3])
    if fused is None or projection not in ("gate_up_proj", "down_proj"):
        yield Part(name.replace("moe.router.weight", "moe.router.layer.weight"), values)  # Granite's, newly saved
        return
    place = f"{fused[1]}.mlp.{'shared_expert' if fused[2] == 'shared_mlp' else 'experts'}"
    kind = ".bias" if fused[4] == "_bias" else ".weight"
    if kind == ".weight" and values.ndim == 3 and _lies_in_columns(values, projection, layout, hidden):
        values = values.swapaxes(1, 2)
    if projection == "down_proj":
        yield Part(f"{place}.down_proj{kind}", values)
        return
    axis = 0 if fused[2] == "shared_mlp" else 1
    for half, each in zip(("gate_proj", "up_proj"), _halves(values, axis, layout)):
        yield Part(f"{place}.{half}{kind}", each)


def _lies_in_columns(values: np.ndarray, projection: str, layout: Layout, hidden: int) -> bool:
    """Return True if an expert's inputs are its rows. Newer checkpoints of such families have them as columns."""
    if layout == "columns":
        return values.shape[2 if projection == "gate_up_proj" else 1] != hidden
    return layout == "interleaved"


def _halves(values: np.ndarray, axis: int, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return (gates, ups)."""
    if layout == "interleaved":
        return values[:, ::2], values[:, 1::2]
    gates, ups = np.split(values, 2, axis)
    return gates, ups
