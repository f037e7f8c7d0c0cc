from dataclasses import replace

import pytest

from lorafit.config import RunConfig
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats, PlanInputs, estimate_memory
from lorafit.memory.execution_plan import kept_in_words
from lorafit.memory.footprint import Execution
from planning_shapes import LLAMA_1B, LLAMA_8B, PHI3, facts, shape

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
    # lorafit's eager layers with whole logits on one H200, 2026-11: torch 2.11, transformers 5.17, rows of 512 tokens,
    # half of them supervised, r = 16, paged 8-bit AdamW: the peak that the allocator reserved, and CUDA's own
    # share, in GiB
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
def test_the_estimate_is_within_its_uncertainty_of_what_a_gpu_measured(
    config, tokens, checkpointing, targets, quantization, measured_gib
):
    policy = {"on": "recompute", "off": "keep"}[checkpointing]
    run = RunConfig(
        memory_policy=f"{policy},micro_tokens={tokens}", targets=targets, quantization=quantization,
        optimizer="paged_adamw_8bit",
    )  # fmt: skip
    rows = DataStats(16, 16 * 512, 8 * 512, 512, 512.0)
    memory = estimate_memory(PlanInputs(run, rows, shape(config), H200), Execution(loss="supervised"))
    assert memory.peak_bytes / GIB == pytest.approx(measured_gib, rel=memory.uncertainty)


@pytest.mark.parametrize(
    ("execution", "dropout", "checkpointing", "measured_gib"),
    [
        (Execution(loss="all", wide_stream=True), 0.05, "on", 24.5),  # transformers + peft + bitsandbytes
        (Execution(loss="chunks", wide_stream=True), 0.05, "on", 14.1),  # the same + Liger kernels
        (Execution(fused=True, loss="chunks"), 0.0, "on", 9.3),  # compiled layers, all recomputed
    ],
)
def test_the_count_explains_the_peers_and_the_probe(execution, dropout, checkpointing, measured_gib):
    """Llama-3.1-8B shape, NF4, r = 16 on q and v, 4 × 2,048 dense tokens: peak of allocated memory on an H200."""
    policy = {"on": "recompute", "off": "keep"}[checkpointing]
    run = RunConfig(memory_policy=f"{policy},micro_tokens=8192", dropout=dropout)
    memory = estimate_memory(
        PlanInputs(run, DataStats(64, 64 * 2048, 64 * 2048, 2048, 2048.0), shape(), H200), execution
    )
    allocated = sum(part.size_bytes for part in memory.components if part.name not in ("CUDA context", "fragmentation"))
    assert allocated / GIB == pytest.approx(measured_gib, rel=0.03)


LONG = DataStats(64, 64 * 2048, 64 * 2048, 2048, 2048.0)


def part(memory, name):
    return next(component.size_bytes for component in memory.components if component.name == name)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"max_length": 4096}, "activations"),
        ({"memory_policy": "recompute_layers=16"}, "activations"),
        ({"memory_policy": "recompute_layers=16,recompute_mlp_layers=16"}, "activations"),
        ({"memory_policy": "keep"}, "activations"),
        ({"targets": "all-linear"}, "adapters"),
        ({"rank": 64}, "adapters"),
        ({"quantization": "none"}, "base, linear layers"),
        ({"compute": "fp32"}, "embeddings and lm_head"),
    ],
)
def test_more_of_anything_needs_more_memory(changes, name):
    recomputed = {} if {"memory_policy"} & set(changes) else {"memory_policy": "recompute"}
    less = estimate_memory(PlanInputs(RunConfig(memory_policy="recompute"), facts(), shape(), H200))
    more = estimate_memory(PlanInputs(RunConfig(**recomputed, **changes), facts(), shape(), H200))
    assert part(more, name) > part(less, name)
    assert more.peak_bytes > less.peak_bytes


def test_kept_and_recomputed_peaks_are_those_of_checkpointing_off_and_on():
    kept = estimate_memory(PlanInputs(RunConfig(memory_policy="keep"), facts(), shape(), H200))
    recomputed = estimate_memory(PlanInputs(RunConfig(memory_policy="recompute"), facts(), shape(), H200))
    assert kept.peak_bytes == kept.kept_bytes == recomputed.kept_bytes
    assert recomputed.peak_bytes == recomputed.recomputed_bytes == kept.recomputed_bytes


def test_what_was_never_measured_is_less_certain():
    assert estimate_memory(PlanInputs(RunConfig(), facts(), shape(), H200)).uncertainty == 0.10
    assert estimate_memory(PlanInputs(RunConfig(), facts(), shape(), CPU)).uncertainty == 0.30
    for model in (replace(shape(), counted=True), shape(model_type="phi")):
        assert estimate_memory(PlanInputs(RunConfig(), facts(), model, H200)).uncertainty == 0.30


def test_fits_compares_the_peak_with_the_budget():
    memory = estimate_memory(PlanInputs(RunConfig(), facts(), shape(), H200))
    assert memory.fits(H200.with_memory(memory.peak_bytes))
    assert not memory.fits(H200.with_memory(memory.peak_bytes - 1))


def test_the_estimate_is_json_ready_and_adds_up():
    fields = estimate_memory(PlanInputs(RunConfig(), facts(), shape(), H200)).to_dict()
    assert fields["peak_bytes"] == sum(component["bytes"] for component in fields["components"])
    assert all(component["assumes"] for component in fields["components"])


@pytest.mark.parametrize(
    "start",
    [{}, {"offloaded_layers": 8}, {"recompute_layers": 8, "recompute_mlp_layers": 8}, {"recompute_mlp_layers": 32}],
)
@pytest.mark.parametrize("component", ["recompute_mlp_layers", "recompute_layers", "offloaded_layers"])
def test_turning_the_policy_further_never_needs_more(start, component):
    def peak(count):
        policy = MemoryPolicy(**{**start, component: count}).clamped(32)
        return estimate_memory(
            PlanInputs(RunConfig(memory_policy=str(policy), max_length=8192), LONG, shape(), H200)
        ).peak_bytes

    # the first offloaded layer is still in flight, and the last one recomputed is at work as it would be kept
    counts = [
        count for count in range(33) if (component, count) not in (("offloaded_layers", 1), ("recompute_layers", 32))
    ]
    peaks = [peak(count) for count in counts]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_embeddings_on_the_host_and_fewer_tokens_need_less_too():
    def estimate(policy):
        return estimate_memory(PlanInputs(RunConfig(memory_policy=policy, max_length=8192), LONG, shape(), H200))

    here, moved, fewer = estimate("keep"), estimate("host_embeddings=on"), estimate("micro_tokens=4096")
    assert here.peak_bytes - moved.peak_bytes == moved.host_bytes == 2 * 128256 * 4096
    assert part(fewer, "activations") == pytest.approx(part(here, "activations") / 2, rel=0.01)
    assert here.host_bytes == fewer.host_bytes == 0


def test_what_is_offloaded_is_in_host_memory_and_two_layers_of_it_in_flight():
    kept = estimate_memory(PlanInputs(RunConfig(memory_policy="keep", max_length=8192), LONG, shape(), H200))
    away = estimate_memory(PlanInputs(RunConfig(memory_policy="offload", max_length=8192), LONG, shape(), H200))
    assert away.host_bytes == part(kept, "activations")
    assert part(away, "activations") == 0
    assert part(away, "activations in flight") == pytest.approx(away.host_bytes / 16)


def test_shared_embeddings_stay_where_lm_head_needs_them():
    memory = estimate_memory(PlanInputs(RunConfig(memory_policy="host_embeddings=on"), facts(), shape(LLAMA_1B), H200))
    assert memory.host_bytes == 0


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (MemoryPolicy(), "everything the backward pass needs"),
        (MemoryPolicy(recompute_layers=32), "each layer's input; the rest is recomputed"),
        (
            MemoryPolicy(recompute_layers=2, recompute_mlp_layers=3),
            "the input of 2 layers, all but the feed-forward of 3, everything of the rest",
        ),
        (MemoryPolicy(offloaded_layers=30), "activations of 2 of 32 layers, kept until their backward pass"),
    ],
)
def test_the_estimate_says_what_is_kept(policy, words):
    assert kept_in_words(policy, 32) == words
