"""ModelShape: the sizes of a model and its adapter targets, from its config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from lorafit.config import base_folder
from lorafit.shapes.dimensions import (
    PUBLISHED,
    Dimensions,
    holds,
    noise_keys,
    published_in,
    quantization_of,
    read_config,
    read_dimensions,
    require_causal,
    require_groups,
    size,
    text_part,
)
from lorafit.shapes.families import FAMILIES, Family, Part
from lorafit.shapes.length_limit import LengthLimit, length_limit
from lorafit.shapes.projection import Projection
from lorafit.shapes.recurrence import Recurrence
from lorafit.shapes.skeleton import skeleton_sizes

DEQUANTIZED = "the base is published in {}: each tensor is dequantized while it is loaded"
ROUTERS = "the routers are frozen, and their auxiliary loss is off"
MOST_PACKED = 1 << 31
"""Weights of one tensor that bitsandbytes can count; larger tensors stay in 16 bits."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Hold the sizes of a decoder-only model; lengths in values, counts in parameters.

    Attributes:
        name: The base, as it was named.
        family: Model type.
        sizes: Layers, heads, widths.
        projections: Every kind of matrix in the decoder.
        tied_embeddings: Whether lm_head is the token embedding.
        embedding_parameters: Tokens' and learned positions' embeddings.
        head_parameters: lm_head, unless it is tied.
        norm_parameters: Norms, biases, routers, and everything else of the decoder.
        tower_parameters: Image or audio towers.
        normed_width: Values that norms see per token and layer.
        learned_positions: Whether there is a table of positions.
        capped_scores: Whether attention caps its scores, and so holds them (Gemma 2).
        linear_class: Class of the decoder's linear modules: `Linear`, which 4 bits support, or another.
        quantized: How the checkpoint is quantized (`nf4`, `gptq`, …), if it is.
        counted: Whether the sizes were read from transformers' own modules.
        notes: Assumptions where the shape is not exact.
        unpacked: Why its rows are not packed; empty for a family whose rows are.
        limit: The length above which its rows train one a forward.
        alone: Why its rows train one a forward; empty where they are packed or padded.
        recurrences: Modules that carry a state along the sequence, with their memory.
    """

    name: str
    family: str
    sizes: Dimensions
    projections: tuple[Projection, ...]
    tied_embeddings: bool
    embedding_parameters: int
    head_parameters: int
    norm_parameters: int
    tower_parameters: int
    normed_width: int
    learned_positions: bool
    capped_scores: bool
    linear_class: str
    quantized: str | None
    counted: bool = False
    notes: tuple[str, ...] = ()
    unpacked: str = ""
    limit: LengthLimit | None = None
    alone: str = ""
    recurrences: tuple[Recurrence, ...] = ()

    @classmethod
    def from_base(cls, base: str, revision: str | None = None) -> ModelShape:
        """Return the shape of a local folder or hub id. Only config.json is read. Raises BackboneError."""
        return cls.from_config(read_config(base_folder(base, revision)), base)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str) -> ModelShape:
        """Return the shape that a config.json describes.

        A child process counts families outside the table with transformers, and refuses what training refuses. Raises
        BackboneError when config.json describes no decoder that transformers loads as a causal language model.
        """
        require_causal(config, name)
        text = text_part(config)
        require_groups(text, name)
        model_type = str(text.get("model_type", "unknown"))
        # the decoder of a multimodal model is counted with its towers, by transformers
        if model_type in FAMILIES and model_type == config.get("model_type"):
            shape = _from_table(FAMILIES[model_type], model_type, config, name)
        else:
            shape = _from_skeleton(model_type, config, name)
        if shape.expert_parameters:
            shape = replace(shape, notes=(*shape.notes, ROUTERS))
        if published := published_in(config):
            shape = replace(shape, notes=(*shape.notes, DEQUANTIZED.format(PUBLISHED[published])))
        noise = noise_keys(text)
        note = f"the base's own noise in training is off ({', '.join(noise)}); the setting dropout is the adapters'"
        return replace(shape, notes=(*shape.notes, note) if noise else shape.notes, limit=length_limit(text))

    def for_rows(self, longest: int) -> ModelShape:
        """Return the shape for rows of up to `longest` tokens: above a limit every row runs alone."""
        reason = self.limit.reason(longest) if self.limit else ""
        return replace(self, unpacked=self.unpacked or reason, alone=reason) if reason else self

    @property
    def is_padded(self) -> bool:
        """True when rows that are not packed share right-padded micro-batches."""
        return bool(self.unpacked) and not self.alone

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.sizes.layers

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.sizes["h"]

    @property
    def intermediate(self) -> int:
        """Width of a feed-forward layer."""
        return self.sizes["f"]

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.sizes.heads

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.sizes.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.sizes["d"]

    @property
    def vocab(self) -> int:
        """Entries of the vocabulary."""
        return self.sizes["v"]

    @property
    def max_positions(self) -> int | None:
        """Longest row the model was trained for; None when config.json leaves it out."""
        return self.sizes.get("p")

    @property
    def experts_per_token(self) -> int:
        """Experts that one token visits; 1 without experts."""
        return self.sizes.experts_per_token

    @property
    def linears(self) -> tuple[Projection, ...]:
        """The decoder's linear modules, without the stacked experts and lm_head."""
        return tuple(projection for projection in self.projections if not projection.stacked)

    @property
    def module_names(self) -> tuple[str, ...]:
        """Names of the decoder's linear modules, each once, in the order of the layer."""
        return tuple(dict.fromkeys(linear.name for linear in self.linears))

    @property
    def is_gated(self) -> bool:
        """True when the feed-forward layers are gated, as SwiGLU is."""
        return any(projection.role in ("gate", "gate_up") for projection in self.projections)

    @property
    def linear_parameters(self) -> int:
        """Weights of the decoder's linear modules."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def expert_parameters(self) -> int:
        """Weights of stacked experts."""
        return sum(projection.parameters for projection in self.projections if projection.stacked)

    @property
    def packed(self) -> tuple[Projection, ...]:
        """The matrices that are in 4 bits when the base is quantized; a base stored in 4 bits has its experts in 16."""
        return tuple(part for part in self.projections if not part.stacked or (part.packs and not self.quantized))

    @property
    def packed_parameters(self) -> int:
        """Weights of the decoder that 4-bit quantization compresses."""
        return sum(part.parameters for part in self.packed)

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

    def to_dict(self) -> dict[str, Any]:
        """Return the main sizes, JSON-ready."""
        return {
            "name": self.name,
            "family": self.family,
            "layers": self.layers,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "parameters": self.parameters,
            "notes": list(self.notes),
        }

    def named(self, names: tuple[str, ...]) -> tuple[Projection, ...]:
        """Return the linear modules and stacked experts that one of `names` selects, and that take an adapter."""
        return tuple(part for part in self.projections if part.is_adaptable and any(map(part.is_named, names)))


def _from_table(family: Family, model_type: str, config: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape of a family of the table."""
    text = {**family.defaults, **text_part(config)}
    sizes = read_dimensions(text, family, name)
    tied = bool(text.get("tie_word_embeddings", family.tied))
    return ModelShape(
        name=name,
        family=model_type,
        sizes=sizes,
        projections=tuple(_projections(family, text, sizes)),
        tied_embeddings=tied,
        embedding_parameters=sizes["v"] * sizes["w"] + size(family.positions, sizes) * sizes["h"],
        head_parameters=0 if tied else sizes["v"] * sizes["w"],
        norm_parameters=_small_parameters(family, text, sizes),
        tower_parameters=0,
        normed_width=size(family.norms, sizes),
        learned_positions=bool(family.positions),
        capped_scores=bool(text.get("attn_logit_softcapping")),
        linear_class=family.linear_class,
        quantized=quantization_of(config),
        unpacked=family.unpacked,
    )


def _from_skeleton(model_type: str, config: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that transformers' own modules have."""
    found = skeleton_sizes(config, name)
    sizes = Dimensions(
        letters=found.pop("letters"),
        layers=found.pop("layers"),
        sparse_layers=0,
        heads=found.pop("heads"),
        kv_heads=found.pop("kv_heads"),
        experts_per_token=found.pop("experts_per_token"),
    )
    projections = tuple(Projection(**part) for part in found.pop("projections"))
    return ModelShape(
        name=name,
        family=model_type,
        sizes=sizes,
        projections=projections,
        quantized=quantization_of(config),
        counted=True,
        recurrences=tuple(map(Recurrence.from_dict, found.pop("recurrences"))),
        **found,
    )


def _projections(family: Family, config: Mapping[str, Any], sizes: Dimensions) -> Iterator[Projection]:
    for part in family.parts:
        count = sizes.layers_of(part.layers)
        if count and holds(part.when, config):
            yield _projection(part, count, sizes)


def _projection(part: Part, count: int, sizes: Dimensions) -> Projection:
    name = part.path.rpartition(".")[2]
    inputs, outputs = size(part.inputs, sizes), size(part.outputs, sizes)
    if not part.stacked:
        return Projection(name, part.path, part.role, inputs, outputs, count, obstacle=part.obstacle)
    experts = max(sizes["n"], 1)
    packs = part.packs and inputs * outputs * experts < MOST_PACKED
    share = sizes.experts_per_token / experts
    return Projection(
        name, part.path, part.role, inputs, outputs, count * sizes["n"], True, share, group=experts, packs=packs
    )


def _small_parameters(family: Family, config: Mapping[str, Any], sizes: Dimensions) -> int:
    """Return the parameters that are neither matrix nor embedding: norms, biases, routers."""
    total = size(family.final, sizes)
    for text, condition in family.small:
        if condition == "sparse":
            total += size(text, sizes) * sizes.layers_of("sparse")
        elif holds(condition, config):
            total += size(text, sizes) * sizes.layers
    for part in family.parts:
        if holds(part.when, config) and holds(part.bias, config):
            total += size(part.outputs, sizes) * sizes.layers_of(part.layers)
    return total
