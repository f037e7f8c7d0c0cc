"""Train on bases with unusual configurations, and compare the first loss with plain transformers, each row alone.

    PYTHONPATH=src:tests:bench python bench/odd_configs.py [KIND …]

Each kind is tried on three families, as tiny random bases. A line has what `plan` and `train` say, or the difference.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from families import attempt, planned, trained, write_rows
from transformers import CONFIG_MAPPING

from families_zoo import counted_here, small_config
from lorafit.backbone.architecture import auto_class
from tiny_models import save_tokenizer

SLIDES, SEES_ALL = "sliding_attention", "full_attention"
MIXED = [SEES_ALL, SLIDES, SEES_ALL, SLIDES]
NOT_TRAINED = {"quantization": "none"}
CODE = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}


def _rotated(share: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}}


def _same(families: str, **changes: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(families.split(), changes)


KINDS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "kv-heads": _same("llama qwen3 gemma3_text", num_attention_heads=6, num_key_value_heads=4, hidden_size=96),
    "head-dim": _same("llama qwen3 mistral", head_dim=24),
    "tied": _same("llama qwen3", tie_word_embeddings=True) | _same("gemma2", tie_word_embeddings=False),
    "sliding": {
        "gemma3_text": {"sliding_window": 8, "layer_types": MIXED},
        "qwen2": {"use_sliding_window": True, "sliding_window": 8, "layer_types": MIXED},
        "mistral": {"sliding_window": 8},
    },
    "partial-rotary": {"phi3": _rotated(0.5), "glm": _rotated(0.25), "nemotron": _rotated(0.5)},
    "bias": _same("llama qwen3 granite", attention_bias=True),
    "caps": _same("gemma2 gemma3_text", final_logit_softcapping=3.0, attn_logit_softcapping=2.0)
    | _same("cohere", logit_scale=3.0),
    "scales": {
        "granite": {"embedding_multiplier": 5.0, "logits_scaling": 3.0, "residual_multiplier": 0.4},
        "minicpm3": {"scale_emb": 7, "scale_depth": 1.4, "dim_model_base": 32},
        "gemma3_text": {"query_pre_attn_scalar": 64},
    },
    "no-rope": _same("smollm3 llama4_text", no_rope_layers=[1, 0, 1, 0])
    | _same("cohere2", layer_types=MIXED, sliding_window=8),
    "dropout": _same("llama qwen3", attention_dropout=0.5)
    | _same("gpt_neox", attention_dropout=0.5, hidden_dropout=0.5),
    "torch-dtype": _same("llama qwen3 gemma3_text"),
    "code-known": _same("llama qwen2 mistral"),
    "code-unknown": _same("llama qwen2 mistral"),
}
"""Kind -> family -> what its configuration has unlike the tiny one."""
WRITTEN: Mapping[str, Mapping[str, Any]] = {
    "torch-dtype": {"torch_dtype": "bfloat16", "dtype": None},
    "code-known": CODE,
    "code-unknown": CODE | {"model_type": "my_own"},
}
"""Kind -> what config.json says unlike transformers' own; None leaves a key out."""


def tried(kind: str, family: str, changes: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what `plan` and `train` make of the base."""
    base, rows = folder / "base", folder / "rows.jsonl"
    save_odd(kind, family, changes, base)
    write_rows(rows)
    plan = attempt("plan", planned, rows, base, "all-linear", NOT_TRAINED)
    return {"plan": plan, "train": attempt("train", trained, rows, base, folder / "run", "all-linear", NOT_TRAINED)}


def save_odd(kind: str, family: str, changes: Mapping[str, Any], folder: Path) -> None:
    """Write a tiny random base of `family` whose configuration has `changes`."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in small_config(family).to_dict().items() if key != "model_type"}
    config = CONFIG_MAPPING[family](**(sizes | dict(changes)))
    model = auto_class(config).from_config(config)
    for name, weight in model.named_parameters():
        if weight.ndim >= 2 or name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.08)
    model.to(torch.bfloat16 if kind == "torch-dtype" else torch.float32).save_pretrained(folder)
    save_tokenizer(folder)
    file = folder / "config.json"
    written = json.loads(file.read_text(encoding="utf-8")) | dict(WRITTEN.get(kind, {}))
    text = json.dumps({key: value for key, value in written.items() if value is not None})
    file.write_text(text, encoding="utf-8")


def results(kinds: list[str]) -> Iterator[dict[str, Any]]:
    """Yield a JSON-ready line for every family of `kinds`."""
    for kind in kinds:
        for family, changes in KINDS[kind].items():
            with tempfile.TemporaryDirectory(prefix="lorafit-odd-") as folder:
                found = tried(kind, family, changes, Path(folder))
            said = {stage: one.get("refused") or one.get("crashed") or "ok" for stage, one in found.items()}
            yield {"kind": kind, "family": family, **said, "difference": found["train"].get("loss_difference")}


if __name__ == "__main__":
    subprocess.run = counted_here(subprocess.run)
    transformers.logging.set_verbosity_error()
    for line in results(sys.argv[1:] or list(KINDS)):
        print(json.dumps(line), flush=True)
