import pytest

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory.footprint import (
    NF4_BYTES,
    movable_embedding_bytes,
    static_memory,
)
from planning_shapes import LLAMA_1B, TINY, inputs, shape

H200 = hardware_named("H200")
CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)


def parts(hardware=H200, model=None, **settings):
    listed = static_memory(inputs(RunConfig(**settings), model=model, hardware=hardware))
    return {component.name: component.size_bytes for component in listed}


def test_the_base_is_counted_in_its_own_bits():
    nf4 = parts()
    full = parts(quantization="none")
    linear = 6_979_321_856
    assert full["base, linear layers"] == 2 * linear
    assert nf4["base, linear layers"] == pytest.approx(NF4_BYTES * linear, rel=1e-3)
    assert nf4["base, linear layers"] / 32 == pytest.approx(113e6, rel=0.01)  # DESIGN: 113 MB a layer
    assert nf4["embeddings and lm_head"] == 2 * 2 * 128256 * 4096


def test_stacked_experts_are_in_4_bits():
    moe = shape(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    memory = parts(model=moe)
    weights = moe.linear_parameters + moe.expert_parameters
    assert weights > 46e9  # Mixtral 8x7B
    assert memory["base, linear layers and experts"] == pytest.approx(NF4_BYTES * weights, rel=1e-3)


def test_experts_that_transformers_multiplies_in_a_way_of_its_own_stay_in_16_bits():
    scout = {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 256, "intermediate_size_mlp": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024}
    moe = shape(model_type="llama4_text", num_local_experts=16, num_experts_per_tok=1, **scout, **heads)
    assert parts(model=moe)["norms, biases, experts"] > 2 * moe.expert_parameters


def test_adapters_gradients_and_optimizer_are_counted_from_the_targets():
    weights = 32 * 16 * ((4096 + 4096) + (4096 + 1024))
    assert inputs(RunConfig(rank=16, targets="qv")).adapter_parameters == weights
    paged = parts(optimizer="paged_adamw_8bit")
    plain = parts(optimizer="adamw")
    assert paged["adapters"] == paged["adapter gradients"] == 4 * weights
    assert plain["optimizer state"] == 8 * weights
    assert paged["optimizer state"] == pytest.approx(2 * weights, rel=0.02)


def test_a_cpu_computes_in_fp32_and_keeps_dense_copies_in_half_of_what_is_left():
    memory = parts(CPU, shape(TINY))
    assert memory["dequantized copies"] == 4 * shape(TINY).linear_parameters
    large = parts(CPU)
    assert 0 < large["dequantized copies"] < 8 * GIB
    assert large["embeddings and lm_head"] == 4 * 2 * 128256 * 4096


def test_moments_are_in_32_bits_where_they_are_small():
    assert inputs().optimizer == "adamw"
    assert inputs(hardware=H200.with_memory(GIB)).optimizer == "paged_adamw_8bit"
    assert inputs(hardware=CPU.with_memory(GIB // 64)).optimizer == "adamw"
    assert inputs(RunConfig(optimizer="adamw_8bit")).optimizer == "adamw_8bit"


def test_input_embeddings_may_move_unless_the_head_shares_them():
    size = 2 * 128256 * 4096
    assert movable_embedding_bytes(inputs()) == size
    assert movable_embedding_bytes(inputs(model=shape(LLAMA_1B))) == 0
    assert movable_embedding_bytes(inputs(hardware=CPU)) == 0
    there = static_memory(inputs())
    moved = static_memory(inputs(), host_embeddings=True)
    assert sum(part.size_bytes for part in there) - sum(part.size_bytes for part in moved) == size


def test_fp8_keeps_activations_and_embeddings_in_16_bits():
    assert parts(compute="fp8") == parts(compute="bf16")
