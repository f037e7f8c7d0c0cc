"""Skeleton sizes: sizes of a model family that is missing from the family table.

They are read from transformers' own modules on the meta device. Planning runs this file as a child process, so that
it needs no torch itself: `python -m lorafit.backbone.skeleton.sizes FOLDER` writes one JSON object, the sizes or an
error.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from lorafit.backbone.architecture import (
    architecture_of,
    decoder_layers,
    linears_to_quantize,
    one_line,
    output_head,
    read_architecture,
    skeleton,
    text_decoder,
)
from lorafit.backbone.projections import EXPERTS, EXPERTS_PER_TOKEN, first_number, projections_of
from lorafit.backbone.skeleton.forward import require_forward
from lorafit.backbone.skeleton.recurrence import recurrences_of, recurrent_parts
from lorafit.errors import BackboneError
from lorafit.shapes.families import CARRIES, DROPS_ROWS, MASKED, OWN_ATTENTION


def main(folder: str) -> None:
    """Write the sizes of the model in `folder`, or the error, to standard output."""
    try:
        found: dict[str, Any] = sizes_of(Path(folder))
    except BackboneError as error:
        found = {"error": error.what, "fix": error.fix}
    except Exception as error:
        # transformers may raise any error on an unexpected config
        found = {"error": f"transformers cannot build the model ({one_line(error)})", "fix": "check config.json"}
        if not isinstance(error, (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError)):
            raise
    sys.stdout.write(json.dumps(found))


def sizes_of(folder: Path) -> dict[str, Any]:
    """Return layers, widths, projections and parameter counts of the model in `folder`, all JSON-ready."""
    architecture = read_architecture(folder)
    model = skeleton(architecture)
    text, decoder, head = architecture.get_text_config(), text_decoder(model), output_head(model)
    layers = decoder_layers(model)
    embeddings = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.Embedding)}
    _require_layers(model, text, layers)
    _require_causal(model, decoder)
    _require_text_alone(model)
    require_forward(model)
    tables = _parameters(embeddings.values())
    projections = projections_of(model)
    matrices = sum(part.parameters for part in projections)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    own_head = [] if head is None or id(head.weight) in tables else [head]
    of_head = _parameters(own_head)
    inside = sum(count for weight, count in _parameters([decoder]).items() if weight not in of_head)
    return {
        "layers": len(layers),
        "heads": heads,
        "kv_heads": kv_heads,
        "experts_per_token": first_number(text, EXPERTS_PER_TOKEN) if first_number(text, EXPERTS) else 1,
        "letters": {
            "h": int(text.hidden_size),
            "d": head_dim,
            "f": max((part.inputs for part in projections if part.role == "down"), default=int(text.hidden_size)),
            "v": int(text.vocab_size),
            "p": first_number(text, ("max_position_embeddings", "n_positions", "max_seq_len")),
        },
        "projections": [asdict(part) for part in projections],
        "tied_embeddings": not own_head,
        "embedding_parameters": sum(tables.values()),
        "head_parameters": sum(of_head.values()),
        "norm_parameters": inside - matrices - sum(tables.values()),
        "tower_parameters": sum(_parameters([model]).values()) - inside - sum(of_head.values()),
        "normed_width": _normed_width(layers, heads * head_dim, kv_heads * head_dim, head_dim),
        "learned_positions": any("pos" in path or "wpe" in path for path in embeddings),
        "capped_scores": bool(getattr(text, "attn_logit_softcapping", None)),
        "linear_class": _linear_class(model, decoder),
        "unpacked": _unpacked(model, decoder),
        "recurrences": recurrences_of(model),
    }


def _require_layers(model: nn.Module, text: Any, layers: list[nn.Module]) -> None:
    """Raise BackboneError for a model that is not one stack of layers."""
    what = "" if layers else f"transformers' {type(model).__name__} has no decoder layers"
    if layers and not hasattr(text, "hidden_size"):
        what = f"{type(text).__name__} states no hidden size, since the model is not one stack of layers"
    if what:
        raise BackboneError(what, fix="choose another base")


def _require_causal(model: nn.Module, decoder: nn.Module) -> None:
    """Raise BackboneError for an encoder, and for a decoder that predicts several tokens at once."""
    if getattr(architecture_of(model).get_text_config(), "ngram", 1) > 1:
        what = f"{type(decoder).__name__} predicts several tokens at once: its tokens see later tokens"
        raise BackboneError(what, fix="choose a causal language model")
    attentions = [part for part in decoder.modules() if isinstance(getattr(part, "is_causal", None), bool)]
    # transformers only warns of an encoder's causal class without is_decoder
    asks = "is_decoder" in inspect.getsource(type(model).__init__) and not getattr(
        architecture_of(model), "is_decoder", True
    )
    causal = any(part.is_causal or getattr(part, "is_decoder", False) is True for part in attentions)
    if asks or (attentions and not causal):
        what = f"{type(decoder).__name__} is an encoder: its tokens see later tokens"
        raise BackboneError(what, fix="choose a causal language model")


def _require_text_alone(model: nn.Module) -> None:
    """Raise BackboneError for a model whose forward demands more than the ids of a row."""
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [one.name for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
    if more := [name for name in needed if name != "input_ids"]:
        what = f"{type(model).__name__} needs {', '.join(more)} with every row, and lorafit trains on text"
        raise BackboneError(what, fix="choose a causal language model")


def _unpacked(model: nn.Module, decoder: nn.Module) -> str:
    """Return the reason in its code that rows of `model` are not packed; the start of a run proves it."""
    if getattr(model, "_is_stateful", False) or any(isinstance(part, nn.Conv1d) for part in decoder.modules()):
        return CARRIES
    if not type(decoder)._can_set_attn_implementation():  # type: ignore[attr-defined, operator, unused-ignore]
        return OWN_ATTENTION
    indexers = (type(part).forward for part in decoder.modules() if "Indexer" in type(part).__name__)
    if any("attention_mask" in inspect.signature(forward).parameters for forward in indexers):
        return MASKED
    parts = [part for part in decoder.modules() if type(part).__name__.endswith(("Attention", "DecoderLayer"))]
    return "" if all(map(_takes_options, parts)) else DROPS_ROWS


def _takes_options(part: nn.Module) -> bool:
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(type(part).forward).parameters.values())


def _linear_class(model: nn.Module, decoder: nn.Module) -> str:
    """Return `Linear` if the decoder has linears for 4 bits, else the class of the linears that it has."""
    if linears_to_quantize(model):
        return "Linear"
    kinds = (type(module) for module in decoder.modules() if isinstance(module, (nn.Linear, Conv1D)))
    return next((kind.__name__ for kind in kinds), "Linear")


def _parameters(modules: Any) -> dict[int, int]:
    """Return the size of each parameter of `modules` by its identity; shared parameters count once."""
    return {id(weight): weight.numel() for module in modules for weight in module.parameters()}


def _normed_width(layers: list[nn.Module], query_width: int, key_width: int, head_dim: int) -> int:
    """Return the number of values of one token that the norms of the mean layer read.

    A norm over one head reads all heads.
    """
    total = 0
    for layer in layers:
        counted = {inner for part in recurrent_parts(layer) for inner in part.modules()}
        for path, module in layer.named_modules():
            if module in counted:
                continue  # counted with the recurrence
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and weight is not None:
                name = path.rpartition(".")[2]
                wide = {"q": query_width, "k": key_width}.get(name[:1]) if weight.numel() == head_dim else None
                total += wide or weight.numel()
    return total // len(layers)


if __name__ == "__main__":
    main(sys.argv[1])
