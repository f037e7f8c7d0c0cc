"""published_weights: the tensors of a base that was published in FP8 or MXFP4, dequantized one at a time.

transformers' own functions dequantize (`Fp8Dequantize`, `convert_moe_packed_tensors`), so a tensor has the bits that
transformers loads with `dequantize=True`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from lorafit.errors import BackboneError

Entry = Mapping[str, Any]
Shards = Mapping[Path, Mapping[str, Entry]]
WIDTHS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8 = ("F8_E4M3", "F8_E5M2")
BLOCKS, SCALES = "_blocks", "_scales"
"""Endings of the two tensors that hold a parameter in MXFP4."""
ROWS_AT_ONCE = 1 << 20
"""Blocks of 32 values that are dequantized at once; the temporary indices take 4 bytes a value."""


@dataclass(frozen=True)
class Packed:
    """Hold the places of one parameter's values and scales.

    Attributes:
        values: (file, name) of the values.
        scales: (file, name) of their scales.
        dtype: Safetensors name of the dtype of the dequantized parameter.
        block: (rows, columns) that share a scale; None where the shapes alone tell.
    """

    values: tuple[Path, str]
    scales: tuple[Path, str]
    dtype: str
    block: tuple[int, int] | None = None

    def dense(self, device: str | torch.device = "cpu") -> Tensor:
        """Return the parameter, dequantized on `device`."""
        values, scales = (read_stored(*place).to(device) for place in (self.values, self.scales))
        if self.values[1].endswith(BLOCKS):
            dense: Tensor = convert_moe_packed_tensors(
                values, scales, dtype=WIDTHS[self.dtype], rows_per_chunk=ROWS_AT_ONCE
            )
            return dense
        return _from_fp8(values, scales, self.block, WIDTHS[self.dtype])


def read_stored(path: Path, name: str) -> Tensor:
    """Return the tensor `name` of the safetensors file at `path`, as it is stored."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def dense_view(shards: Shards, settings: Mapping[str, Any], dtype: str) -> dict[Path, dict[str, Entry]]:
    """Return the headers as those of the dequantized base: its names and shapes, in `dtype`.

    `settings` is config.json's quantization_config. The entry of a dequantized tensor has its `packed` parts. Raises
    BackboneError for a tensor in FP8 without scales.
    """
    place = {name: path for path, tensors in shards.items() for name in tensors}
    mxfp4 = settings.get("quant_method") == "mxfp4"
    found = dict(_in_mxfp4(place, dtype) if mxfp4 else _in_fp8(shards, place, settings, dtype))
    hidden = {name for dense, packed in found.items() for name in _companions(dense, packed)}
    view: dict[Path, dict[str, Entry]] = {path: {} for path in shards}
    for path, tensors in shards.items():
        for name, entry in tensors.items():
            dense = name.removesuffix(BLOCKS) if mxfp4 else name
            if dense in found:
                view[path][dense] = _dense_entry(entry, found[dense])
            elif name not in hidden:
                view[path][name] = entry
    return view


def _dense_entry(entry: Entry, packed: Packed) -> Entry:
    shape = [int(size) for size in entry["shape"]]
    if packed.values[1].endswith(BLOCKS):
        experts, rows, groups, width = shape
        shape = [experts, groups * width * 2, rows]
    elif entry["dtype"] == "I8":  # two values of FP4 in a byte
        shape[-1] *= 2
    size = math.prod(shape) * WIDTHS[packed.dtype].itemsize
    return {"dtype": packed.dtype, "shape": shape, "data_offsets": [0, size], "packed": packed}


def _companions(dense: str, packed: Packed) -> Iterator[str]:
    """Yield the names of the tensors beside the values, which the dequantized base does not have."""
    yield packed.scales[1]
    yield f"{dense.removesuffix('weight')}activation_scale"
    yield f"{dense}_activation_scale"


def _in_mxfp4(place: Mapping[str, Path], dtype: str) -> Iterator[tuple[str, Packed]]:
    for name, path in place.items():
        scales = name.removesuffix(BLOCKS) + SCALES
        if name.endswith(BLOCKS) and scales in place:
            yield name.removesuffix(BLOCKS), Packed((path, name), (place[scales], scales), dtype)


def _in_fp8(
    shards: Shards, place: Mapping[str, Path], settings: Mapping[str, Any], dtype: str
) -> Iterator[tuple[str, Packed]]:
    size = settings.get("weight_block_size")
    block = (int(size[0]), int(size[1])) if isinstance(size, list) and len(size) == 2 else None
    for path, tensors in shards.items():
        for name, entry in tensors.items():
            if entry["dtype"] not in (*FP8, "I8"):
                continue
            stem = name.removesuffix("weight")
            names = (f"{name}_scale_inv", f"{stem}scale", f"{stem}qscale_weight")
            scales = next((each for each in names if each in place), None)
            if scales is None and entry["dtype"] in FP8:
                what = f"{name} is stored in FP8 without its scale ({names[0]})"
                raise BackboneError(what, where=str(path), fix="choose the base's 16-bit checkpoint")
            if scales is not None:
                yield name, Packed((path, name), (place[scales], scales), dtype, block)


def _from_fp8(values: Tensor, scales: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """Return `values` times the scale of their block.

    transformers takes whole blocks alone, so the last blocks of a weight are filled up (DeepSeek V3's
    `kv_a_proj_with_mqa` has 576 rows in blocks of 128).
    """
    rows, columns = values.shape[-2:]
    missing = (0, 0)
    if block is not None and scales.ndim >= 2 and values.dtype != torch.int8:
        grid = scales.shape[-2:]
        if grid == (-(-rows // block[0]), -(-columns // block[1])):
            missing = (grid[0] * block[0] - rows, grid[1] * block[1] - columns)
    if any(missing):
        # FP8 has no padding of its own
        values = torch.nn.functional.pad(values.to(torch.float32), (0, missing[1], 0, missing[0]))
    dense: Tensor = Fp8Dequantize(None)._dequantize_one(values, scales, output_dtype=dtype)
    return dense[..., :rows, :columns].contiguous() if any(missing) else dense


class LazyTensor:
    """Stand for one tensor in transformers' loading, which asks for `tensor[...]` when its turn has come."""

    def __init__(self, path: Path, name: str, packed: Packed | None, device: str | torch.device):
        self._path, self._name, self._packed, self._device = path, name, packed, device

    def __getitem__(self, index: Any) -> Tensor:
        if self._packed is not None:
            return self._packed.dense(self._device)[index]
        return read_stored(self._path, self._name)[index]
