"""Families: the names and sizes of the projections of decoder-only models, as data.

A family is one row of FAMILIES. The rows are taken from transformers 5.23 (`models/*/modeling_*.py`), and the tests
check them against its models. Conditions are written in the keys of config.json: `key`, `!key`, joined by `&` and `|`.
Sizes are written in the letters of `shapes.dimensions`:

    h       hidden size
    q, kv   width of the queries, and of the keys
    f       width of the feed-forward layer
    d       width of one head
    x, s    width of one expert, and of the shared expert
    n       number of experts
    a       number of heads
    m       width of the dense feed-forward layers of Llama 4
    p       learned positions
    v, w    vocabulary, and the width of its embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Role = Literal["q", "k", "v", "qkv", "kv", "o", "attention", "gate", "up", "gate_up", "down", "mixer", "other"]
LayerKind = Literal["all", "dense", "sparse"]
ATTENTION_ROLES = frozenset({"q", "k", "v", "qkv", "kv", "o", "attention"})
EXPERT_NAMES = "PEFT reads its name as that of the experts; all-linear+experts, or its name, adapts it as a parameter"
"""Obstacle of the feed-forwards beside experts, where PEFT rewrites the targets of older checkpoints.

PEFT takes them as `target_parameters`, which know neither dropout nor DoRA nor a base in 4 bits; so they are asked for.
"""
OWN_ATTENTION = "its attention is its own, and takes no row boundaries"
DROPS_ROWS = "its layers do not pass row boundaries on to attention"
MASKED = "its attention picks its keys from a mask of the row, which packed rows do not have"
CARRIES = "its recurrent or convolutional layers carry a state from row to row"
"""Reasons for rows that are not packed."""


@dataclass(frozen=True, slots=True)
class Part:
    """Hold one projection of a decoder layer.

    Attributes:
        path: Module path within the layer.
        role: What the projection does.
        inputs: Size of the input.
        outputs: Size of the output.
        bias: Condition under which it has a bias.
        when: Condition under which it exists.
        layers: Kind of layers that have it.
        stacked: Whether it is one 3-D parameter of all experts, not an `nn.Linear`.
        packs: Whether 4-bit quantization packs it.
        obstacle: Why it cannot take an adapter; empty when it can.
    """

    path: str
    role: Role
    inputs: str
    outputs: str
    bias: str = ""
    when: str = "true"
    layers: LayerKind = "all"
    stacked: bool = False
    packs: bool = True
    obstacle: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """Hold the parts of a model type.

    Attributes:
        parts: Projections of one layer.
        small: Other parameters of one layer (norms, routers), each with its condition.
        final: Size of the other parameters outside the layers.
        norms: Width that norms see per token and layer.
        positions: Rows of a learned position table.
        tied: Whether lm_head is the token embedding when config.json leaves it out.
        one_kv_head: Condition under which all heads share one key.
        linear_class: Class of the projections.
        defaults: Values of keys that config.json may leave out.
        unpacked: Why its rows are not packed; empty for a family whose rows are.
    """

    parts: tuple[Part, ...]
    small: tuple[tuple[str, str], ...]
    final: str = "h"
    norms: str = "2*h"
    positions: str = ""
    tied: bool = False
    one_kv_head: str = ""
    linear_class: Literal["Linear", "Conv1D", "FalconLinear"] = "Linear"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unpacked: str = ""


def _attention(bias: str = "", out_bias: str = "", out: str = "o_proj", module: str = "self_attn") -> tuple[Part, ...]:
    return (
        Part(f"{module}.q_proj", "q", "h", "q", bias),
        Part(f"{module}.k_proj", "k", "h", "kv", bias),
        Part(f"{module}.v_proj", "v", "h", "kv", bias),
        Part(f"{module}.{out}", "o", "q", "h", out_bias),
    )


def _gated(bias: str = "", width: str = "f", module: str = "mlp", layers: LayerKind = "all") -> tuple[Part, ...]:
    return (
        Part(f"{module}.gate_proj", "gate", "h", width, bias, layers=layers),
        Part(f"{module}.up_proj", "up", "h", width, bias, layers=layers),
        Part(f"{module}.down_proj", "down", width, "h", bias, layers=layers),
    )


def _plain(up: str, down: str, bias: str = "true", module: str = "mlp.") -> tuple[Part, ...]:
    return Part(f"{module}{up}", "up", "h", "f", bias), Part(f"{module}{down}", "down", "f", "h", bias)


def _experts(width: str = "x", module: str = "mlp", packs: bool = True) -> tuple[Part, ...]:
    place = f"{module}.experts"
    return (
        Part(f"{place}.gate_up_proj", "gate_up", "h", f"2*{width}", layers="sparse", stacked=True, packs=packs),
        Part(f"{place}.down_proj", "down", width, "h", layers="sparse", stacked=True, packs=packs),
    )


def _norms(size: str) -> tuple[tuple[str, str], ...]:
    return ((size, "true"),)


def _fused(name: str, out: str, module: str, bias: str = "true") -> tuple[Part, ...]:
    return Part(f"{module}.{name}", "qkv", "h", "q+2*kv", bias), Part(f"{module}.{out}", "o", "q", "h", bias)


def _shared(module: str, width: str) -> tuple[Part, ...]:
    return _gated(width=width, module=f"{module}.shared_expert", layers="sparse")


_ROUTER = ("n*h", "sparse")
_LLAMA = Family(_attention("attention_bias", "attention_bias") + _gated("mlp_bias"), _norms("2*h"))
_MISTRAL = Family(_attention() + _gated(), _norms("2*h"))
_QWEN2 = Family(_attention("true") + _gated(), _norms("2*h"))
_QWEN3 = Family(_attention("attention_bias", "attention_bias") + _gated(), _norms("2*h+2*d"), norms="2*h+q+kv")
_GEMMA = replace(_LLAMA, small=_norms("2*h"), tied=True, defaults={"head_dim": 256})
_GEMMA2 = replace(_GEMMA, small=_norms("4*h"), norms="4*h")
_GEMMA3 = replace(
    _GEMMA,
    small=_norms("4*h+2*d"),
    norms="4*h+q+kv",
    # the published text_config of the smaller models leaves out default values
    defaults={
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "max_position_embeddings": 131072,
    },
)  # fmt: skip
_PHI3 = Family(
    (
        Part("self_attn.qkv_proj", "qkv", "h", "q+2*kv"),
        Part("self_attn.o_proj", "o", "q", "h"),
        Part("mlp.gate_up_proj", "gate_up", "h", "2*f"),
        Part("mlp.down_proj", "down", "f", "h"),
    ),
    _norms("2*h"),
)
_GLM = Family(_attention("attention_bias") + _PHI3.parts[2:], _norms("2*h"), defaults={"attention_bias": True})
_GPT2 = Family(
    _fused("c_attn", "c_proj", "attn") + _plain("c_fc", "c_proj"),
    _norms("4*h"),
    final="2*h",
    positions="p",
    tied=True,
    linear_class="Conv1D",
    defaults={"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
)
_NEOX = Family(
    _fused("query_key_value", "dense", "attention", "attention_bias") + _plain("dense_h_to_4h", "dense_4h_to_h"),
    _norms("4*h"),
    final="2*h",
    defaults={"attention_bias": True},
)
_FALCON = Family(
    _fused("query_key_value", "dense", "self_attention", "bias") + _plain("dense_h_to_4h", "dense_4h_to_h", "bias"),
    (("2*h", "true"), ("2*h", "new_decoder_architecture|!parallel_attn")),
    final="2*h",
    tied=True,
    one_kv_head="multi_query&!new_decoder_architecture",
    linear_class="FalconLinear",
    unpacked=OWN_ATTENTION,
    defaults={"multi_query": True, "parallel_attn": True},
)
_QWEN2_MOE = Family(
    _attention("qkv_bias") + _gated(layers="dense") + _experts() + _shared("mlp", "s")
    + (Part("mlp.shared_expert_gate", "other", "h", "1", layers="sparse"),),
    (*_norms("2*h"), _ROUTER),
    defaults={"qkv_bias": True},
)  # fmt: skip
_COHERE = Family(_attention("attention_bias", "attention_bias") + _gated(), _norms("h"), norms="h", tied=True)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "smollm3": replace(_LLAMA, tied=True),
    "granite": _LLAMA,
    "helium": _LLAMA,
    "seed_oss": replace(
        _LLAMA,
        parts=_attention("attention_bias", "attention_out_bias") + _gated("mlp_bias"),
        defaults={"attention_bias": True},
    ),
    "mistral": _MISTRAL,
    "ministral": _MISTRAL,
    "ministral3": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "phi3": _PHI3,
    "phi": Family(
        _attention("true", "true", out="dense") + _plain("fc1", "fc2"),
        (("2*h", "true"), ("4*d", "qk_layernorm")),
        final="2*h+v",
    ),
    "glm": _GLM,
    "glm4": replace(_GLM, small=_norms("4*h"), norms="4*h"),
    "exaone4": Family(_MISTRAL.parts, _norms("2*h+2*d"), norms="2*h+q+kv"),
    "olmo": Family(_QWEN3.parts, (), final="0"),
    "olmo2": Family(_QWEN3.parts, _norms("2*h+q+kv"), norms="2*h+q+kv"),
    "olmo3": Family(_QWEN3.parts, _norms("2*h+q+kv"), norms="2*h+q+kv"),
    "stablelm": Family(
        unpacked=DROPS_ROWS,
        parts=_attention("use_qkv_bias") + _gated(),
        small=(("2*h", "true"), ("2*h", "!use_parallel_residual"), ("q+kv", "qk_layernorm")),
        final="2*h",
    ),
    "starcoder2": Family(
        _attention("use_bias", "use_bias") + _plain("c_fc", "c_proj", "use_bias"),
        _norms("4*h"),
        final="2*h",
        tied=True,
        defaults={"use_bias": True},
    ),
    "cohere": replace(_COHERE, small=(("h", "true"), ("q+kv", "use_qk_norm"))),
    "cohere2": _COHERE,
    "gpt2": _GPT2,
    "gpt_bigcode": replace(_GPT2, linear_class="Linear", one_kv_head="multi_query", defaults={"multi_query": True}),
    "gpt_neox": _NEOX,
    "gptj": Family(
        _attention(out="out_proj", module="attn") + _plain("fc_in", "fc_out"),
        _norms("2*h"),
        final="2*h+v",
        unpacked=OWN_ATTENTION,
    ),
    "falcon": _FALCON,
    "bloom": Family(
        _fused("query_key_value", "dense", "self_attention") + _plain("dense_h_to_4h", "dense_4h_to_h"),
        _norms("4*h"),
        final="4*h",
        tied=True,
        unpacked=OWN_ATTENTION,
    ),
    "mpt": Family(
        (
            Part("attn.Wqkv", "qkv", "h", "q+2*kv"),
            Part("attn.out_proj", "o", "q", "h"),
            Part("ffn.up_proj", "up", "h", "f"),
            Part("ffn.down_proj", "down", "f", "h"),
        ),
        _norms("2*h"),
        tied=True,
        unpacked=OWN_ATTENTION,
    ),
    "opt": Family(
        _attention("enable_bias", "enable_bias", out="out_proj") + _plain("fc1", "fc2", "enable_bias", module=""),
        _norms("4*h"),
        final="2*h",
        positions="p+2",
        tied=True,
        defaults={"enable_bias": True},
    ),
    "mixtral": Family(_attention() + _experts("f"), (*_norms("2*h"), _ROUTER)),
    "phimoe": Family(
        _attention("attention_bias", "attention_bias")
        + _experts("f")
        + (Part("mlp.router", "other", "h", "n", layers="sparse"),),
        _norms("4*h"),
        final="2*h",
    ),
    "granitemoe": Family(_attention() + _experts("f", "block_sparse_moe"), (*_norms("2*h"), _ROUTER)),
    "olmoe": Family(_attention() + _experts("f"), (*_norms("2*h+q+kv"), _ROUTER), norms="2*h+q+kv"),
    "qwen2_moe": _QWEN2_MOE,
    "qwen3_moe": Family(
        _QWEN3.parts[:4]
        + tuple(replace(part, obstacle=EXPERT_NAMES) for part in _gated(layers="dense"))
        + _experts(), (*_norms("2*h+2*d"), _ROUTER), norms="2*h+q+kv"
    ),
    "llama4_text": Family(
        _attention("attention_bias", "attention_bias")
        + _gated(width="m", module="feed_forward", layers="dense")
        + _experts("f", "feed_forward", packs=False)
        + _shared("feed_forward", "f")
        + (Part("feed_forward.router", "other", "h", "n", layers="sparse"),),
        _norms("2*h"),
    ),
    "gpt_oss": Family(
        _attention("attention_bias", "attention_bias") + _experts("f"),
        (("2*h+a", "true"), ("n*h+n+n*2*f+n*h", "sparse")),
        defaults={"attention_bias": True},
    ),
}  # fmt: skip
"""Model type of config.json -> its family."""
