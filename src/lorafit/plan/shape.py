"""ModelShape: what a model is made of, read from its config.json alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config import base_folder
from lorafit.errors import BackboneError
from lorafit.plan.dimensions import Dimensions, holds, read_dimensions, size
from lorafit.plan.families import ALIASES, ATTENTION_ROLES, FAMILIES, Family, Part, Role

NESTED = ("text_config", "llm_config", "language_config")
MAX_CONFIG_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Projection:
    """One kind of projection of the decoder: `count` matrices (outputs, inputs), `name` the module's own name.

    `stacked` ones are 3-D parameters of experts, not modules. `active` is the share that one token passes.
    """

    name: str
    path: str
    role: Role
    inputs: int
    outputs: int
    count: int
    stacked: bool = False
    active: float = 1.0

    @property
    def parameters(self) -> int:
        """Weights in all `count` matrices."""
        return self.inputs * self.outputs * self.count

    @property
    def is_attention(self) -> bool:
        """True for what makes queries, keys, values, or mixes the heads."""
        return self.role in ATTENTION_ROLES


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of a decoder-only model.

    `exact` is False when the family is unknown or has parts that are only estimated; `notes` then say what is
    assumed. `quantized` names how the checkpoint is already quantised (`nf4`, `gptq`, …), if it is.
    """

    name: str
    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int | None
    tied_embeddings: bool
    projections: tuple[Projection, ...]
    embedding_parameters: int
    head_parameters: int
    norm_parameters: int
    normed_width: int = 0
    experts_per_token: int = 1
    tower_parameters: int = 0
    linear_class: str = "Linear"
    quantized: str | None = None
    known: bool = True
    exact: bool = True
    notes: tuple[str, ...] = ()

    @classmethod
    def from_base(cls, base: str, revision: str | None = None) -> ModelShape:
        """The shape of a local folder or hub id; only config.json is read. Raises BackboneError."""
        return cls.from_config(read_config(base_folder(base, revision)), base)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """The shape that a config.json describes. Raises BackboneError when it describes no decoder."""
        if config.get("is_encoder_decoder"):
            raise BackboneError(
                "an encoder-decoder, and lorafit trains decoder-only models", where=name, fix="choose a causal LM"
            )
        text = _text_config(config)
        model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
        key = ALIASES.get(model_type, model_type)
        family = FAMILIES.get(key)
        known = family or FAMILIES["llama"]
        text = {**known.defaults, **{key: value for key, value in text.items() if value is not None}}
        sizes = read_dimensions(text, known, name)
        tower = _tower_parameters(config)
        tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", known.tied)))
        return cls(
            name=name,
            family=key,
            layers=sizes.layers,
            hidden=sizes["h"],
            intermediate=sizes["f"],
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes["d"],
            vocab=sizes["v"],
            max_positions=sizes.get("p"),
            tied_embeddings=tied,
            projections=tuple(_projections(known, text, sizes)),
            embedding_parameters=sizes["v"] * sizes["w"] + size(known.positions, sizes) * sizes["h"],
            head_parameters=0 if tied else sizes["v"] * sizes["w"],
            norm_parameters=_small_parameters(known, text, sizes),
            normed_width=size(known.norms, sizes),
            experts_per_token=sizes.experts_per_token,
            tower_parameters=tower,
            linear_class=known.linear_class,
            quantized=_quantized(config),
            known=family is not None,
            exact=family is not None and not tower,
            notes=tuple(_notes(family, model_type, tower)),
        )

    @property
    def linears(self) -> tuple[Projection, ...]:
        """The decoder's linear modules, without the stacked experts and lm_head."""
        return tuple(projection for projection in self.projections if not projection.stacked)

    @property
    def module_names(self) -> tuple[str, ...]:
        """The names of the decoder's linear modules, each once, in the order of the layer."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear modules: what 4-bit quantisation compresses."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def expert_parameters(self) -> int:
        """Weights of stacked experts, which are no modules: they stay in 16 bits."""
        return sum(projection.parameters for projection in self.projections if projection.stacked)

    @property
    def parameters(self) -> int:
        """Every parameter of the model."""
        return (
            self.linear_parameters
            + self.expert_parameters
            + self.embedding_parameters
            + self.head_parameters
            + self.norm_parameters
            + self.tower_parameters
        )

    @property
    def active_parameters(self) -> int:
        """Weights that one token is multiplied with, lm_head included."""
        decoder = sum(projection.parameters * projection.active for projection in self.projections)
        return round(decoder) + self.vocab * self.hidden

    def named(self, names: tuple[str, ...]) -> tuple[Projection, ...]:
        """The linear modules that have one of `names`."""
        return tuple(linear for linear in self.linears if linear.name in names)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json in `folder`. Raises BackboneError when it is none."""
    path = folder / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BackboneError("cannot read the base's config.json", where=str(path), fix="check the file") from error
    try:
        config = json.loads(text[: MAX_CONFIG_BYTES + 1])
    except (json.JSONDecodeError, RecursionError) as error:
        raise BackboneError("config.json is not valid JSON", where=str(path), fix="download the base again") from error
    if not isinstance(config, dict):
        raise BackboneError("config.json is no mapping of settings", where=str(path), fix="download the base again")
    return config


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    nested = next((config[key] for key in NESTED if isinstance(config.get(key), Mapping)), None)
    if nested is None:
        return config
    wrapper = {"model_type": config.get("model_type")}
    return {**wrapper, **{key: value for key, value in nested.items() if value is not None}}


def _projections(family: Family, config: Mapping[str, Any], sizes: Dimensions) -> Iterator[Projection]:
    for part in family.parts:
        count = sizes.layers_of(part.place)
        if count and holds(part.when, config):
            yield _projection(part, count, sizes)


def _projection(part: Part, count: int, sizes: Dimensions) -> Projection:
    name = part.path.rpartition(".")[2]
    inputs, outputs = size(part.inputs, sizes), size(part.outputs, sizes)
    if not part.stacked:
        return Projection(name, part.path, part.role, inputs, outputs, count)
    share = sizes.experts_per_token / max(sizes["n"], 1)
    return Projection(name, part.path, part.role, inputs, outputs, count * sizes["n"], True, share)


def _small_parameters(family: Family, config: Mapping[str, Any], sizes: Dimensions) -> int:
    """Norms, biases, routers: everything that is neither a matrix nor an embedding."""
    total = size(family.final, sizes)
    for text, condition in family.small:
        if condition == "sparse":
            total += size(text, sizes) * sizes.layers_of("sparse")
        elif holds(condition, config):
            total += size(text, sizes) * sizes.layers
    for part in family.parts:
        if holds(part.when, config) and holds(part.bias, config):
            total += size(part.outputs, sizes) * sizes.layers_of(part.place)
    return total


def _tower_parameters(config: Mapping[str, Any]) -> int:
    """An estimate of an image or audio tower: its layers' matrices; 0 where there is none."""
    total = 0
    for key in ("vision_config", "audio_config"):
        tower = config.get(key)
        if isinstance(tower, Mapping):
            hidden, layers = int(tower.get("hidden_size") or 0), int(tower.get("num_hidden_layers") or 0)
            total += layers * hidden * (4 * hidden + 2 * int(tower.get("intermediate_size") or 4 * hidden))
    return total


def _quantized(config: Mapping[str, Any]) -> str | None:
    """`nf4` or `fp4` of bitsandbytes, else the method's own name; None for a plain checkpoint."""
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping) or not settings:
        return None
    method = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    if method != "bitsandbytes":
        return method
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        return "int8"
    return str(settings.get("bnb_4bit_quant_type") or "fp4")


def _notes(family: Family | None, model_type: str, tower: int) -> Iterator[str]:
    if family is None:
        yield f"'{model_type}' is not a family lorafit knows: its shape is read as if it were built like Llama"
    if tower:
        yield f"the image or audio tower is estimated at {tower / 1e6:,.0f} M parameters"
