"""Skeleton sizes: sizes of a model family that is missing from the family table.

They are read from transformers' own modules on the meta device. Planning runs this file as a child process, so that
it needs no torch itself: `python -m lorafit.backbone.skeleton_sizes FOLDER` writes one JSON object, the sizes or an
error.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lorafit.backbone.architecture import one_line, output_head, read_architecture, skeleton, text_decoder
from lorafit.errors import BackboneError

ROLES = {
    "q": "q_proj q_lin query wq q",
    "k": "k_proj k_lin key wk k",
    "v": "v_proj v_lin value wv v",
    "qkv": "qkv_proj query_key_value c_attn Wqkv qkv att_proj attn_qkv",
    "o": "o_proj out_proj out_lin dense wo attn_out",
    "gate": "gate_proj w1 gate_linear",
    "up": "up_proj w3 fc1 c_fc dense_h_to_4h fc_in linear_1",
    "gate_up": "gate_up_proj input_linear ff_proj",
    "down": "down_proj w2 fc2 dense_4h_to_h fc_out output_linear linear_2 ff_out",
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
ROUTERS = ("gate", "router", "shared_expert_gate")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "top_k")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERT = re.compile(r"(^|\.)experts\.\d+\.")


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
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    embeddings = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.Embedding)}
    if not layers:
        raise BackboneError(f"transformers' {type(model).__name__} has no decoder layers", fix="choose another base")
    tables = _parameters(embeddings.values())
    projections = _projections([*layers, decoder], text)
    matrices = sum(part["inputs"] * part["outputs"] * part["count"] for part in projections)
    heads = int(getattr(text, "num_attention_heads", None) or 1)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    own_head = [] if head is None or id(head.weight) in tables else [head]
    head_parameters = sum(_parameters(own_head).values())
    inside = sum(_parameters([decoder]).values())
    return {
        "layers": len(layers),
        "heads": heads,
        "kv_heads": kv_heads,
        "experts_per_token": _first(text, EXPERTS_PER_TOKEN) if _first(text, EXPERTS) else 1,
        "letters": {
            "h": int(text.hidden_size),
            "d": head_dim,
            "f": max((part["inputs"] for part in projections if part["role"] == "down"), default=int(text.hidden_size)),
            "v": int(text.vocab_size),
            "p": _first(text, ("max_position_embeddings", "n_positions", "max_seq_len")),
        },
        "projections": projections,
        "tied_embeddings": not own_head,
        "embedding_parameters": sum(tables.values()),
        "head_parameters": head_parameters,
        "norm_parameters": inside - matrices - sum(tables.values()),
        "tower_parameters": sum(_parameters([model]).values()) - inside - head_parameters,
        "normed_width": _normed_width(layers, heads * head_dim, kv_heads * head_dim, head_dim),
        "learned_positions": any("pos" in path or "wpe" in path for path in embeddings),
        "capped_scores": bool(getattr(text, "attn_logit_softcapping", None)),
        "linear_class": "Conv1D" if any(isinstance(module, Conv1D) for module in decoder.modules()) else "Linear",
    }


def _parameters(modules: Any) -> dict[int, int]:
    """Return the size of each parameter of `modules` by its identity; shared parameters count once."""
    return {id(weight): weight.numel() for module in modules for weight in module.parameters()}


def _first(text: Any, keys: tuple[str, ...]) -> int:
    """Return the first positive number among the configuration's `keys`; 0 without one."""
    values = (getattr(text, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _projections(parts: list[nn.Module], text: Any) -> list[dict[str, Any]]:
    """Return each kind of matrix in `parts`, with its count and its share for one token.

    A matrix belongs to the first part that holds it. The decoder comes last and gets the matrices outside its layers.
    """
    seen: set[int] = set()
    found = Counter(matrix for part in parts for matrix in _matrices(part, seen, int(text.hidden_size)))
    experts, chosen = _first(text, EXPERTS), _first(text, EXPERTS_PER_TOKEN)
    share = min(1.0, chosen / experts) if experts and chosen else 1.0
    return [
        {
            "name": path.rpartition(".")[2],
            "path": path,
            "role": _role(path),
            "inputs": inputs,
            "outputs": outputs,
            "count": count,
            "stacked": stacked,
            "active": share if stacked or ".experts." in f".{path}" else 1.0,
        }
        for (path, inputs, outputs, stacked), count in found.items()
    ]


def _matrices(part: nn.Module, seen: set[int], hidden: int) -> Iterator[tuple[str, int, int, bool]]:
    """Yield each linear that is not in `seen`: its path, inputs and outputs.

    The last value says whether it is one of stacked experts.
    """
    for path, module in part.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            rows, columns = module.weight.shape
            inputs, outputs = (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
            yield EXPERT.sub(r"\1experts.", path), inputs, outputs, False
    for path, weight in part.named_parameters():
        if weight.dim() == 3 and ".experts." in f".{path}" and id(weight) not in seen:
            seen.add(id(weight))
            count, outputs, inputs = weight.shape
            lies_transposed = (outputs if path.endswith("down_proj") else inputs) != hidden
            inputs, outputs = (outputs, inputs) if lies_transposed else (inputs, outputs)
            yield from ((path, inputs, outputs, True) for _ in range(count))


def _role(path: str) -> str:
    """Return the role of a matrix by its name, else by the module that holds it."""
    leaf, place = path.rpartition(".")[2], path.lower()
    if leaf in ROUTERS:
        return "other"
    in_attention = "attn" in place or "attention" in place
    if leaf == "c_proj":
        return "o" if in_attention else "down"
    role = ROLE_OF.get(leaf)
    if role and in_attention == (role in ("q", "k", "v", "qkv", "o")):
        return role
    return "attention" if in_attention else "mixer"


def _normed_width(layers: list[nn.Module], query_width: int, key_width: int, head_dim: int) -> int:
    """Return the number of values of one token that the norms of the mean layer read.

    A norm over one head reads all heads.
    """
    total = 0
    for layer in layers:
        for path, module in layer.named_modules():
            weight = getattr(module, "weight", None)
            if "norm" in type(module).__name__.lower() and weight is not None:
                name = path.rpartition(".")[2]
                wide = {"q": query_width, "k": key_width}.get(name[:1]) if weight.numel() == head_dim else None
                total += wide or weight.numel()
    return total // len(layers)


if __name__ == "__main__":
    main(sys.argv[1])
