import pytest

from lorafit.errors import BackboneError
from lorafit.shapes import ModelShape
from lorafit.shapes.dimensions import Dimensions, holds, noise_keys, read_dimensions, size
from lorafit.shapes.families import FAMILIES
from planning_shapes import LLAMA_8B


@pytest.mark.parametrize(("text", "value"), [("", 0), ("h", 8), ("2*h", 16), ("q+2*kv", 10), ("n*h+3", 35)])
def test_a_size_is_a_sum_of_products(text, value):
    sizes = Dimensions({"h": 8, "q": 6, "kv": 2, "n": 4}, 2, 0, 2, 1, 1)
    assert size(text, sizes) == value


@pytest.mark.parametrize(
    ("condition", "value"),
    [
        ("", False),
        ("true", True),
        ("bias", True),
        ("!bias", False),
        ("missing", False),
        ("!missing", True),
        ("bias&missing", False),
        ("missing|bias", True),
        ("bias&!missing|missing", True),
    ],
)
def test_a_condition_is_read_from_the_keys_of_the_config(condition, value):
    assert holds(condition, {"bias": True, "missing": None}) is value


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, 0),
        ({"num_experts": 8}, 32),
        ({"num_experts": 8, "decoder_sparse_step": 2}, 16),
        ({"num_experts": 8, "mlp_only_layers": [0, 1]}, 30),
        ({"num_experts": 8, "moe_layers": [3, 7]}, 2),
    ],
)
def test_sparse_layers_are_counted_as_the_config_says(changes, sparse):
    sizes = read_dimensions({**LLAMA_8B, **changes}, FAMILIES["qwen2_moe"], "a-base")
    assert (sizes.layers_of("sparse"), sizes.layers_of("dense")) == (sparse, 32 - sparse)


@pytest.mark.parametrize("layers", [513, 10**9, 1 << 39])
def test_more_layers_than_any_decoder_has_are_a_slip_in_the_config(layers):
    with pytest.raises(BackboneError, match=f"config.json has {layers:,} layers; check config.json"):
        read_dimensions({**LLAMA_8B, "num_hidden_layers": layers}, FAMILIES["llama"], "a-base")
    assert read_dimensions({**LLAMA_8B, "num_hidden_layers": 512}, FAMILIES["llama"], "a-base").layers == 512


def test_too_many_heads_for_the_hidden_size_are_refused():
    with pytest.raises(BackboneError, match="heads"):
        read_dimensions({**LLAMA_8B, "num_attention_heads": 8192}, FAMILIES["llama"], "a-base")


def test_a_jitter_that_routing_needs_outside_training_is_no_noise():
    jitter = {"router_jitter_noise": 0.01, "input_jitter_noise": 0.01}
    assert noise_keys({"model_type": "phimoe", **jitter}) == ("input_jitter_noise",)
    assert noise_keys({"model_type": "mixtral", **jitter}) == tuple(jitter)


def test_latent_attention_needs_a_key_for_every_head():
    """transformers' eager attention repeats the keys of latent attention for groups, and fails on other numbers."""
    config = {"model_type": "deepseek_v3", "kv_lora_rank": 16, "num_attention_heads": 4, "num_key_value_heads": 1}
    with pytest.raises(
        BackboneError, match=r"must be the second where attention is latent; set num_key_value_heads to 4"
    ):
        ModelShape.from_config(config, "a-base")
