"""Walk families at random unusual sizes, from plan to merge; one line each, and exit 1 after a crash or a false yes.

    PYTHONPATH=src:tests:bench python bench/random_configs.py [--seed 0] [FAMILY …]

Each family gets some of: grouped heads, a head of another width, an odd vocabulary, tied or untied embeddings, one
layer, biases, a share of rotated dimensions, a window of 8, three experts of which a token visits one, two shared
experts, no rank of the queries, and layer types in reverse. The draw depends on family and seed alone. A false yes is
a `train` that refuses what `plan` accepted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from families_zoo import counted_here, small_config

FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "glm4", "olmo2", "cohere2", "granite",
    "starcoder2", "gpt_neox", "stablelm", "smollm3", "ernie4_5", "seed_oss", "mixtral", "qwen3_moe", "qwen2_moe",
    "glm4_moe", "dots1", "deepseek_v3", "granitemoehybrid", "qwen3_5_text", "lfm2", "falcon_h1", "gpt_oss", "olmoe",
    "minicpm3", "mistral3", "qwen3_vl",
)  # fmt: skip
VOCABULARY = 733
CHANGES: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96},
    {"num_attention_heads": 4, "num_key_value_heads": 1},
    {"head_dim": 24},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"num_hidden_layers": 1},
    {"attention_bias": True},
    {"use_bias": True},
    {"mlp_bias": True},
    {"qkv_bias": False},
    {"partial_rotary_factor": 0.5},
    {"sliding_window": 8},
    {"num_experts": 3, "num_local_experts": 3, "n_routed_experts": 3, "num_experts_per_tok": 1, "n_group": 1},
    {"n_shared_experts": 2},
    {"q_lora_rank": None},
    {"layer_types": "reversed"},
    {"first_k_dense_replace": 2},
    {"mlp_only_layers": [1]},
)


def changed(config: PretrainedConfig, drawn: random.Random) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return `config` with a draw of the changes that its family has keys for, and those changes."""
    raw = config.to_dict()
    text = raw.get("text_config") or raw
    made: dict[str, Any] = {"vocab_size": VOCABULARY}
    for change in drawn.sample(CHANGES, len(CHANGES)):
        known = {key: value for key, value in change.items() if key in text and key not in made}
        if known and drawn.random() < 0.6:
            made |= known
    if made.get("layer_types") == "reversed":
        made["layer_types"] = text["layer_types"][::-1]
    layers = made.get("num_hidden_layers")
    if layers and isinstance(text.get("layer_types"), list):
        made["layer_types"] = made.get("layer_types", text["layer_types"])[:layers]
    text.update(made)
    raw.update({key: value for key, value in made.items() if key == "tie_word_embeddings"})
    raw.pop("model_type", None)
    return CONFIG_MAPPING[config.model_type](**raw), made


def walk(family: str, seed: int) -> dict[str, Any]:
    """Return what was changed, and what `families.walk` found."""
    made: dict[str, Any] = {}

    def drawn_config(name: str) -> PretrainedConfig:
        config, own = changed(small_config(name), random.Random(f"{name} {seed}"))
        made.update(own)
        return config

    families.small_config = drawn_config
    with tempfile.TemporaryDirectory(prefix="lorafit-random-") as folder:
        return {"made": made} | families.walk(family, Path(folder))


def verdict(found: dict[str, Any]) -> str:
    """Return `works`, or the first thing that does not, with its kind."""
    if not found["built"]:
        return f"transformers builds none: {found['reason']}"
    stages = [one for one in found.values() if isinstance(one, dict) and one.get("ok") is False]
    for one in stages:
        if "crashed" in one:
            return f"CRASH in {one['stage']}: {one['crashed']}"
        if one["stage"] != "plan":
            return f"FALSE YES, {one['stage']} refuses: {one['refused']}"
    if stages:
        return f"plan refuses: {stages[0]['refused']}"
    distance = max(found["all-linear"]["loss_difference"], found["same"]["logits_difference"])
    return "works" if distance <= families.TOLERANCE else f"DIFFERS by {distance:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    subprocess.run = counted_here(subprocess.run)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    bad = 0
    for family in options.families or FAMILIES:
        found = walk(family, options.seed)
        said = verdict(found)
        bad += said.split()[0].isupper()
        print(json.dumps({"family": family, "verdict": said, "made": found["made"]}), flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
