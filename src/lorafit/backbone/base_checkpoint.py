"""Checkpoint: the safetensors files of a base, checked before any tensor is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.backbone.published_weights import LazyTensor, dense_view, read_stored
from lorafit.config import generation_settings, read_json
from lorafit.config.stored_tensors import MAX_HEADER_BYTES, read_header
from lorafit.errors import BackboneError, VerificationError
from lorafit.shapes.dimensions import published_in

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WHOLE_FILE_BYTES = 64 << 20
AGAIN = "download the base again"
STRAY = re.compile(
    r"^base_model\.|^lora_(?:te|te1|te2|unet|transformer)_|^prompt_(?:embeddings|encoder)"
    r"|(?:^|\.)(?:base_layer|modules_to_save|original_module|token_adapter|adaption_prompt|lora_linear_layer)\."
    r"|(?:^|\.)lora_(?:A|B|E|up|down|mid|bias|embedding_A|embedding_B|magnitude_vector)(?:\.|$)"
    r"|(?:^|\.)lora\.(?:up|down)\.|(?:^|\.)(?:lokr_[wt]|hada_[wt])\d"
    r"|(?:^|\.)(?:ranknum|ia3_l|oft_[rsR]|oft_blocks|boft_[Rs]|vera_[AB]|vera_lambda_[bd]|pvera_lambda_[bd]|hra_u"
    r"|fourierft_spectrum|waveft_spectrum|vblora_\w+|randlora_\w+|gralora_\w+|poly_lora_[AB]|shira_weight|c3a_kernel"
    r"|miss_block|bone_block|road_theta|road_alpha|tinylora_v|ln_tuning_layers|trainable_tokens_delta)(?:\.|$)"
)
"""Names that PEFT, kohya's scripts and diffusers give to tensors of an adapter, and PEFT to those beneath one."""
PACKED = re.compile(r"\.(?:qweight|qzeros|weight_packed|W_q|B_24|trellis|q_weight)$")
"""Names that GPTQ, AWQ, compressed-tensors, HQQ, Marlin and EXL give to packed weights."""
DOUBLED = re.compile(r"^((?:\w+\.)+)\1(.+)$")
"""A name whose first parts stand there twice, as a wrapper leaves it."""
SAMPLES, SAMPLE_BYTES = 32, 1 << 20
FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
DTYPES_BY_NAME = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class Checkpoint:
    """Hold the headers of a base's safetensors files.

    A base that was published in FP8 or MXFP4 looks as if it were stored dequantized.

    Attributes:
        folder: The base's folder.
        shards: Tensor names with their header entry (`dtype`, `shape`, `data_offsets`), by shard.
        published: `fp8`, `mxfp4` or `mxfp8` if tensors are dequantized when they are read; else None.
    """

    folder: Path
    shards: Mapping[Path, Mapping[str, Mapping[str, Any]]]
    published: str | None = None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read every header.

        Raises BackboneError for missing, truncated or unreadable files, and for .bin files.
        """
        if (folder / SINGLE).is_file():  # transformers prefers this file to an index, too
            single = cls(folder, {folder / SINGLE: read_header(folder / SINGLE)[0]})
            single._refuse_adapters()
            return single._dequantized()
        if not (folder / INDEX).is_file():
            raise _no_safetensors(folder)
        checkpoint = cls(folder, {path: read_header(path)[0] for path in _indexed(folder)})
        checkpoint._check_index()
        checkpoint._refuse_adapters()
        return checkpoint._dequantized()

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, dequantized if it was published so."""
        path, entry = self._places[name]
        packed = entry.get("packed")
        return read_stored(path, name) if packed is None else packed.dense()

    def lazy_tensors(self, device: str | torch.device) -> dict[str, LazyTensor]:
        """Return stand-ins of all tensors, which are read and dequantized on `device` when transformers loads them."""
        return {name: LazyTensor(path, name, entry.get("packed"), device) for name, path, entry in self.entries()}

    def entries(self) -> Iterator[tuple[str, Path, Mapping[str, Any]]]:
        """Yield (name, shard, header entry) of every tensor, shard by shard."""
        for path, tensors in self.shards.items():
            for name, entry in tensors.items():
                yield name, path, entry

    def names(self) -> set[str]:
        """Return every tensor's name."""
        return {name for name, _, _ in self.entries()}

    def widest_float(self) -> str:
        """Return the safetensors name of the widest floating dtype stored: F32, BF16 or F16."""
        kinds = {entry["dtype"] for _, _, entry in self.entries()} & set(FLOATS)
        if not kinds:
            raise BackboneError("the base holds no floating point weights", where=str(self.folder))
        # bf16 beside fp16 needs fp32 to hold both
        mixed = {"BF16", "F16"} <= kinds
        return "F32" if mixed else max(kinds, key=lambda kind: FLOATS[kind]).replace("F64", "F32")

    def require_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise BackboneError if a tensor's stored shape differs from the one in `shapes`.

        Tensors whose name is not in `shapes` are not checked.
        """
        for name, path, entry in self.entries():
            stored, wanted = tuple(entry["shape"]), shapes.get(name)
            if wanted is not None and stored != wanted:
                what = f"{name} is {_by(stored)}, but config.json says {_by(wanted)}"
                raise BackboneError(what, where=str(path), fix=AGAIN)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, Mapping[str, Any]]]:
        return {name: (path, entry) for name, path, entry in self.entries()}

    def _dequantized(self) -> Checkpoint:
        """Return the view of a published quantized base as it will be loaded; others are returned as they are."""
        file = self.folder / "config.json"
        config = read_json(file, BackboneError) if file.is_file() else {}
        published = published_in(config)
        if published is None:
            if not config.get("quantization_config"):
                self._refuse_whole_numbers()
            return self
        parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
        named = [part.get("dtype", part.get("torch_dtype")) for part in parts]
        dtype = next((DTYPES_BY_NAME[name] for name in named if name in DTYPES_BY_NAME), "BF16")
        return Checkpoint(self.folder, dense_view(self.shards, config["quantization_config"], dtype), published)

    def _refuse_whole_numbers(self) -> None:
        """Raise BackboneError for weights of few bits, which transformers would read as if they had no scales."""
        for name, _, entry in self.entries():
            if name.endswith(".weight") and entry["dtype"] not in FLOATS:
                what = f"{name} is stored in {entry['dtype']!s:.20}, and config.json does not say how it was quantized"
                raise BackboneError(what, where=str(self.folder), fix="choose the base's 16-bit checkpoint")

    def _refuse_adapters(self) -> None:
        """Raise BackboneError for tensors of an adapter that was not merged, and for tensors of a wrapper."""
        strays = sorted(name for name in self.names() if STRAY.search(name))
        if strays:
            raise BackboneError(
                f"an unmerged adapter lies in the base ({len(strays)} tensors, such as {strays[0]})",
                where=str(self.folder),
                fix="in PEFT save merge_and_unload() of that model, and use that folder; or download the base again",
            )
        names = self.names()
        if packed := sorted(name for name in names if PACKED.search(name)):
            what = f"the base is already quantized ({len(packed)} packed tensors, such as {packed[0]})"
            raise BackboneError(what, where=str(self.folder), fix="choose the base's 16-bit checkpoint")
        for name in sorted(names):
            if (match := DOUBLED.match(name)) and match[1] + match[2] in names:
                what = f"{name} lies in the base beside {match[1]}{match[2]}, and the model reads one of them"
                raise BackboneError(what, where=str(self.folder), fix=AGAIN)

    def _check_index(self) -> None:
        present = self.names()
        for name, file in _weight_map(self.folder).items():
            if name not in present:
                raise BackboneError(
                    f"tensor {name} is in the index but not in {file}",
                    where=str(self.folder),
                    fix=AGAIN,
                )


def base_damages(folder: Path) -> list[BackboneError]:
    """Return an error for every missing, truncated or unreadable file of the base, and for settings no answer ends by.

    The list is empty when `Checkpoint.open` and `generation_settings` would succeed.
    """
    found: list[BackboneError] = []
    single = [folder / SINGLE] if (folder / SINGLE).is_file() else []
    try:
        paths = single or ([folder / name for name in _names(folder)] if (folder / INDEX).is_file() else [])
    except BackboneError as error:
        return [error]
    for path in paths:
        try:
            if not path.is_file():
                raise _missing(path)
            read_header(path)
        except BackboneError as error:
            found.append(error)
    for check in (generation_settings, *(() if found else (Checkpoint.open,))):
        try:
            check(folder)
        except BackboneError as error:
            found.append(error)
    return found


def base_fingerprint(folder: Path) -> str:
    """Return a content hash (sha256, hex) of the base's config.json and safetensors files.

    Files up to 64 MiB count whole. Of larger ones the name, size, header and 32 evenly spaced blocks of 1 MiB
    count (first and last included). A fine-tune or another quantization changes nearly every block, so the hash tells
    it from the original. A single flipped byte in a large file can go unnoticed.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(Checkpoint.open(folder).shards):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as stream:
            for start, length in _samples(size):
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()


def require_same_base(folder: Path, fingerprint: str | None) -> None:
    """Raise VerificationError unless the base in `folder` has this `base_fingerprint`.

    A fingerprint of None is not checked.
    """
    if fingerprint is not None and base_fingerprint(folder) != fingerprint:
        raise VerificationError(
            "the base has changed since the run was trained",
            where=str(folder),
            fix="use the base that the run was trained on",
        )


def _samples(size: int) -> list[tuple[int, int]]:
    if size <= WHOLE_FILE_BYTES:
        return [(0, size)]
    last = size - SAMPLE_BYTES
    return [(last * index // (SAMPLES - 1), SAMPLE_BYTES) for index in range(SAMPLES)]


def _no_safetensors(folder: Path) -> BackboneError:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return BackboneError(
            "the base has only pickled weights (.bin), and loading them can run code",
            where=str(folder),
            fix="if you trust it, convert it: AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)",
        )
    for pattern, wanted in (("model.safetensors.index.*.json", INDEX), ("model.*.safetensors", SINGLE)):
        for path in sorted(folder.glob(pattern)):
            what, fix = f"the base's weights have another name ({path.name})", f"rename {path.name} to {wanted}"
            return BackboneError(what, where=str(folder), fix=fix)
    if shards := sorted(path.name for path in folder.glob("*-of-*.safetensors")):
        what = f"the base has shards of weights, such as {shards[0]}, and no {INDEX} that says what is in them"
        return BackboneError(what, where=str(folder), fix=AGAIN)
    return BackboneError(
        "the base has no model.safetensors", where=str(folder), fix="point --base at a folder with the weights"
    )


def _weight_map(folder: Path) -> dict[str, str]:
    weights = read_json(folder / INDEX, BackboneError, max_bytes=MAX_HEADER_BYTES, fix=AGAIN).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise BackboneError("the weight index names no files", where=str(folder / INDEX), fix=AGAIN)
    return weights


def _names(folder: Path) -> list[str]:
    names = sorted(set(_weight_map(folder).values()))
    for name in names:
        if Path(name).name != name:
            raise BackboneError(f"the weight index points outside the folder ({name})", where=str(folder / INDEX))
    return names


def _indexed(folder: Path) -> list[Path]:
    paths = [folder / name for name in _names(folder)]
    for path in paths:
        if not path.is_file():
            raise _missing(path)
    return paths


def _by(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _missing(path: Path) -> BackboneError:
    return BackboneError(f"{path.name} is in the index but not in the folder", where=str(path.parent), fix=AGAIN)
