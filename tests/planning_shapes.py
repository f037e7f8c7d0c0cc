"""Shapes and facts that the plan's tests share."""

import random

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.memory import DataStats, PlanInputs
from lorafit.memory.layer_costs import LayerCosts, Link
from lorafit.shapes import ModelShape

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
LLAMA_1B = LLAMA_8B | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TINY = LLAMA_8B | {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "tie_word_embeddings": True,
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32064,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}


def shape(config=LLAMA_8B, **changes):
    return ModelShape.from_config({**config, **changes}, "a-base")


def facts(rows=2_000, mean=150, longest=900, supervised=0.5, holdout_rows=0):
    tokens = rows * mean
    return DataStats(rows, tokens, int(tokens * supervised), longest, float(mean), holdout_rows)


def inputs(config=None, stats=None, model=None, hardware="H200"):
    """The inputs of a plan; of an 8B on an H200 unless something else is said."""
    device = hardware_named(hardware) if isinstance(hardware, str) else hardware
    return PlanInputs(config or RunConfig(), stats or facts(), model or shape(), device)


def random_case(seed):
    """Costs of a few layers, a link, and a room in bytes."""
    draw = random.Random(seed)
    whole = draw.randint(1, 50)
    light = whole + draw.randint(0, 200)
    costs = LayerCosts(
        draw.randint(1, 7), light + draw.randint(0, 300), light, whole,
        draw.random(), 2 * draw.random(), draw.random(), draw.random() + 0.5,
        *sorted(draw.randint(0, 300) for _ in range(3)), loss_bytes=draw.randint(0, 400), loss_s=draw.random(),
    )  # fmt: skip
    return costs, Link(draw.uniform(50, 600), draw.uniform(50, 600)), draw.randint(50, 3000)
