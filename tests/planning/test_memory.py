import pytest

from lorafit.config import RunConfig
from lorafit.planning import DataFacts, estimate_memory, hardware_named
from lorafit.planning.activations import LORAFIT, Execution
from lorafit.planning.hardware import GIB, Hardware
from lorafit.planning.memory import NF4_BYTES, adapter_parameters, micro_batch
from planning_shapes import LLAMA_1B, LLAMA_8B, PHI3, TINY, facts, shape

H200 = hardware_named("H200")
CPU = Hardware("a CPU", "cpu", 16 * GIB, cores=2)
QWEN3_4B = LLAMA_8B | {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128,
    "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
GEMMA2_2B = {
    "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip

MEASURED = [
    # lorafit's own layers on one H200, 2026-11: torch 2.11, transformers 5.17, rows of 512 tokens, half of them
    # supervised, r = 16, paged 8-bit AdamW: the peak that the allocator reserved, and CUDA's own share, in GiB
    (LLAMA_1B, 2048, "off", "qv", "nf4", 5.55 + 0.74),
    (LLAMA_1B, 8192, "off", "qv", "nf4", 18.95 + 0.74),
    (LLAMA_1B, 8192, "on", "qv", "nf4", 9.00 + 0.74),
    (LLAMA_1B, 8192, "off", "all-linear", "nf4", 25.49 + 0.87),
    (LLAMA_1B, 2048, "off", "qv", "none", 6.88 + 0.87),
    (QWEN3_4B, 2048, "off", "qv", "nf4", 14.27 + 0.87),
    (QWEN3_4B, 4096, "on", "all-linear", "nf4", 8.65 + 0.87),
    (GEMMA2_2B, 2048, "off", "qv", "nf4", 14.80 + 0.87),
    (GEMMA2_2B, 4096, "on", "qv", "nf4", 10.83 + 0.87),
    (PHI3, 4096, "off", "all-linear", "nf4", 24.49 + 0.87),
    (PHI3, 4096, "on", "all-linear", "nf4", 4.73 + 0.87),
    (LLAMA_8B, 2048, "on", "qv", "nf4", 8.01 + 0.87),
    (LLAMA_8B, 2048, "off", "qv", "nf4", 17.47 + 0.87),
    (LLAMA_8B, 8192, "on", "qv", "nf4", 15.72 + 0.87),
    (LLAMA_8B, 8192, "off", "qv", "nf4", 52.88 + 0.87),
    (LLAMA_8B, 4096, "off", "all-linear", "nf4", 41.10 + 0.99),
    (LLAMA_8B, 2048, "on", "attention", "none", 17.81 + 0.99),
]


@pytest.mark.parametrize(("config", "tokens", "checkpointing", "targets", "quantization", "measured_gib"), MEASURED)
def test_the_estimate_is_within_its_uncertainty_of_what_a_card_measured(
    config, tokens, checkpointing, targets, quantization, measured_gib
):
    run = RunConfig(
        max_tokens=tokens, targets=targets, quantization=quantization, gradient_checkpointing=checkpointing
    )  # fmt: skip
    rows = DataFacts(16, 16 * 512, 8 * 512, 512, 512.0)
    memory = estimate_memory(shape(config), run, H200, rows)
    assert memory.peak_bytes / GIB == pytest.approx(measured_gib, rel=memory.uncertainty)


@pytest.mark.parametrize(
    ("execution", "dropout", "checkpointing", "measured_gib"),
    [
        (Execution(loss="all", wide_stream=True), 0.05, "on", 24.5),  # transformers + peft + bitsandbytes
        (Execution(loss="chunks", wide_stream=True), 0.05, "on", 14.1),  # the same + Liger kernels
        (Execution(fused=True, loss="chunks"), 0.0, "on", 9.3),  # compiled layers, all recomputed
        (Execution(fused=True, loss="chunks"), 0.0, "off", 32.3),  # compiled layers, no recomputation
    ],
)
def test_the_count_explains_the_peers_and_the_design(execution, dropout, checkpointing, measured_gib):
    """Llama-3.1-8B shape, NF4, r = 16 on q and v, 4 × 2,048 dense tokens: peak of allocated memory on an H200."""
    run = RunConfig(max_tokens=8192, dropout=dropout, gradient_checkpointing=checkpointing)
    memory = estimate_memory(shape(), run, H200, DataFacts(64, 64 * 2048, 64 * 2048, 2048, 2048.0), execution)
    allocated = sum(part.size_bytes for part in memory.components if part.name not in ("CUDA context", "fragmentation"))
    assert allocated / GIB == pytest.approx(measured_gib, rel=0.03)


def part(memory, name):
    return next(component.size_bytes for component in memory.components if component.name == name)


def test_the_base_is_counted_in_its_own_bits():
    nf4 = estimate_memory(shape(), RunConfig(), H200, facts())
    full = estimate_memory(shape(), RunConfig(quantization="none"), H200, facts())
    linear = 6_979_321_856
    assert part(full, "base, linear layers") == 2 * linear
    assert part(nf4, "base, linear layers") == pytest.approx(NF4_BYTES * linear, rel=1e-3)
    assert part(nf4, "base, linear layers") / 32 == pytest.approx(113e6, rel=0.01)  # DESIGN: 113 MB a layer
    assert part(nf4, "embeddings and lm_head") == 2 * 2 * 128256 * 4096


def test_stacked_experts_stay_in_16_bits():
    moe = shape(model_type="mixtral", num_local_experts=8, num_experts_per_tok=2)
    memory = estimate_memory(moe, RunConfig(), H200, facts())
    assert part(memory, "norms, biases, stacked experts") > 2 * moe.expert_parameters


def test_adapters_gradients_and_optimizer_are_counted_from_the_targets():
    weights = 32 * 16 * ((4096 + 4096) + (4096 + 1024))
    assert adapter_parameters(shape(), ("q_proj", "v_proj"), 16) == weights
    paged = estimate_memory(shape(), RunConfig(), H200, facts())
    plain = estimate_memory(shape(), RunConfig(optimizer="adamw"), H200, facts())
    assert part(paged, "adapters") == part(paged, "adapter gradients") == 4 * weights
    assert part(plain, "optimizer state") == 8 * weights
    assert part(paged, "optimizer state") == pytest.approx(2 * weights, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_tokens": 4096}, "activations"),
        ({"gradient_checkpointing": "off"}, "activations"),
        ({"targets": "all-linear"}, "adapters"),
        ({"rank": 64}, "adapters"),
        ({"quantization": "none"}, "base, linear layers"),
        ({"compute": "fp32"}, "embeddings and lm_head"),
    ],
)
def test_more_of_anything_needs_more_memory(changes, name):
    less = estimate_memory(shape(), RunConfig(), H200, facts())
    more = estimate_memory(shape(), RunConfig(**changes), H200, facts())
    assert part(more, name) > part(less, name)
    assert more.peak_bytes > less.peak_bytes


def test_a_micro_batch_is_never_larger_than_a_step_or_the_data():
    assert micro_batch(RunConfig(max_tokens=2048), facts(longest=900)).tokens == 2048
    assert micro_batch(RunConfig(max_tokens=2048, examples_per_step=2), facts(longest=100)).tokens == 200
    assert micro_batch(RunConfig(max_tokens=2048), facts(rows=3, mean=20, longest=30)).tokens == 60
    assert micro_batch(RunConfig(), DataFacts(0, 0, 0, 0, 0.0)).tokens == 1


def test_kept_and_recomputed_peaks_are_those_of_checkpointing_off_and_on():
    kept = estimate_memory(shape(), RunConfig(gradient_checkpointing="off"), H200, facts())
    recomputed = estimate_memory(shape(), RunConfig(gradient_checkpointing="on"), H200, facts())
    assert kept.peak_bytes == kept.kept_bytes == recomputed.kept_bytes
    assert recomputed.peak_bytes == recomputed.recomputed_bytes == kept.recomputed_bytes


def test_a_cpu_computes_in_fp32_and_keeps_dense_copies_in_half_of_what_is_left():
    memory = estimate_memory(shape(TINY), RunConfig(), CPU, facts())
    assert part(memory, "dequantised copies") == 4 * shape(TINY).linear_parameters
    large = estimate_memory(shape(), RunConfig(), CPU, facts())
    assert 0 < part(large, "dequantised copies") < 8 * GIB
    assert part(large, "embeddings and lm_head") == 4 * 2 * 128256 * 4096


def test_what_was_never_measured_is_less_certain():
    assert estimate_memory(shape(), RunConfig(), H200, facts()).uncertainty == 0.10
    assert estimate_memory(shape(), RunConfig(), CPU, facts()).uncertainty == 0.30
    for config in ({"model_type": "brand_new"}, {"model_type": "phi"}):
        assert estimate_memory(shape(**config), RunConfig(), H200, facts()).uncertainty == 0.30


def test_fits_compares_the_peak_with_the_budget():
    memory = estimate_memory(shape(), RunConfig(), H200, facts())
    assert memory.fits(H200.with_memory(memory.peak_bytes))
    assert not memory.fits(H200.with_memory(memory.peak_bytes - 1))


def test_the_estimate_is_json_ready_and_adds_up():
    fields = estimate_memory(shape(), RunConfig(), H200, facts()).to_dict()
    assert fields["peak_bytes"] == sum(component["bytes"] for component in fields["components"])
    assert all(component["assumes"] for component in fields["components"])


def test_lorafit_s_loss_holds_supervised_logits_only():
    mostly_prompt = estimate_memory(shape(), RunConfig(), H200, facts(supervised=0.05))
    assert LORAFIT.loss != "all"
    assert mostly_prompt.peak_bytes < estimate_memory(shape(), RunConfig(), H200, facts(supervised=0.9)).peak_bytes
