"""Decoder layers under the policy: the same gradients at every setting, and less saved."""

from dataclasses import replace
from inspect import signature
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._functorch._aot_autograd.autograd_cache import autograd_cache_key
from torch._functorch._aot_autograd.schemas import AOTConfig

from lorafit.backbone import load_backbone
from lorafit.backbone.kernels import frozen_linear_op
from lorafit.config import resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import DecoderLayers, Workload, collate, find_policy, packed, summed_loss
from lorafit.engine.autotune.measure import measure_level, mlp_matmuls
from lorafit.engine.layers import decoder as recompute
from lorafit.engine.layers import offload
from lorafit.engine.layers.decoder import feed_forward_widths
from lorafit.methods.lora import attach
from tiny_models import save_base, stir

LAYOUTS = ((5, 9, 17), (8, 3, 2, 4), (33,), (5, 9, 17, 4, 4, 4, 4, 4))
TOKENS = 89  # no width of the model
BACKEND = "aot_eager_decomp_partition"  # what decides about saved tensors is the same as on a GPU


def rows_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [(random.integers(4, 250, length), np.arange(length) > 0) for length in lengths]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)
    config = resolve(flags={"base": str(base), "dropout": 0.0, "targets": "all-linear", "rank": 4}).config
    model = attach(load_backbone(config, dense_budget_bytes=0), config)
    stir(model)
    return model.train()


@pytest.fixture(autouse=True)
def small_tensors_leave(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 64)
    monkeypatch.setattr(offload, "CHUNK_BYTES", 1 << 16)


def gradient(model, lengths):
    model.zero_grad()
    with packed(model):
        summed_loss(model, collate(rows_of(lengths))).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


def saved_elements(layers, model):
    """Elements that one layer saves for its tokens: what the policy is about."""
    found = []

    def observe(run, hidden, *rest):
        layers.observe = None
        held = layers._weights[0]
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            run(layers.policy.level(0), hidden.detach().requires_grad_(), *rest)
        mine = [t for t in kept if t.untyped_storage().data_ptr() not in held and TOKENS in t.shape]
        found.append(sum(t.numel() for t in mine if t.is_floating_point()))

    layers.observe = observe
    with layers:
        gradient(model, (50, TOKENS - 50))
    return found[0]


@pytest.mark.parametrize(
    "spec",
    [
        "recompute_mlp_layers=3",
        "recompute_layers=3",
        "recompute_layers=1,recompute_mlp_layers=1,offloaded_layers=2",
        "offloaded_layers=3",
    ],
)
def test_every_setting_has_the_gradient_of_keeping_everything(adapted, spec):
    for lengths in LAYOUTS[:2]:
        wanted = gradient(adapted, lengths)
        with DecoderLayers(adapted, MemoryPolicy.parse(spec, 3), compiled=False):
            assert torch.equal(gradient(adapted, lengths), wanted)


@pytest.mark.slow
def test_compiled_layers_have_the_gradient_of_eager_ones_and_are_compiled_once_for_all_layouts(adapted):
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for spec in ("keep", "recompute_mlp_layers=3", "recompute_layers=1,recompute_mlp_layers=2,offloaded_layers=3"):
        layers = DecoderLayers(adapted, MemoryPolicy.parse(spec, 3), backend=BACKEND)
        for lengths in LAYOUTS:
            wanted = gradient(adapted, lengths)
            with layers:
                got = gradient(adapted, lengths)
            assert float((got - wanted).norm() / wanted.norm()) < 1e-5
        assert layers.notes == [] and layers.compiled
    # one graph for each level, whatever the layers and the layouts
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2


def test_recomputing_the_feed_forward_saves_neither_gate_nor_up_and_keeping_saves_nothing_twice(adapted):
    text, tokens, rank = adapted.config, TOKENS, 4
    heads = text.num_attention_heads + 2 * text.num_key_value_heads
    width = text.hidden_size // text.num_attention_heads
    stream = 2 * text.hidden_size + heads * width + text.num_attention_heads * width
    light = saved_elements(DecoderLayers(adapted, MemoryPolicy(recompute_mlp_layers=3), backend=BACKEND), adapted)
    kept = saved_elements(DecoderLayers(adapted, MemoryPolicy(), backend=BACKEND), adapted)
    if torch.__version__ < "2.13":
        stream += text.hidden_size  # older compilers keep one more stream in fp32; in bf16 they do not
    few = 7 * rank + 2 * width + text.num_attention_heads + 8  # adapters' narrow values, rotary tables, norms
    assert light <= tokens * (stream + few)
    assert kept <= tokens * (stream + few + 2 * text.intermediate_size)
    assert kept - light == tokens * 2 * text.intermediate_size


def trace_keys(model, spec):
    """What torch finds a layer's trace by on disk; it raises where it would not keep it."""
    found = []

    def backend(graph, inputs):
        makers = dict.fromkeys(("fw_compiler", "bw_compiler", "partition_fn", "decompositions"))
        config = AOTConfig(**makers, num_params_buffers=0, aot_id=0, keep_inference_input_mutations=False)
        takes_options = "fx_config" in signature(autograd_cache_key).parameters  # until torch 2.11
        found.append(autograd_cache_key(graph, inputs, config, {} if takes_options else None)[0])
        return graph.forward

    torch._dynamo.reset()
    with DecoderLayers(model, MemoryPolicy.parse(spec, 3), backend=backend) as layers:
        gradient(model, LAYOUTS[0])
        assert layers.compiled
    return found


@pytest.mark.slow
def test_a_layers_trace_is_kept_on_disk_and_found_by_all_that_it_depends_on(adapted, monkeypatch):
    keep = trace_keys(adapted, "keep")
    assert len(keep) == 1
    assert trace_keys(adapted, "keep") == keep
    assert trace_keys(adapted, "recompute_mlp_layers=3") != keep  # the policy
    layer = adapted.get_base_model().model.layers
    with monkeypatch.context() as changed:
        for block in layer:
            changed.setattr(block.input_layernorm, "variance_epsilon", 0.5)
        assert trace_keys(adapted, "keep") != keep  # within the checkpointed graph
    with monkeypatch.context() as changed:
        changed.setattr(frozen_linear_op._TracedLinear, "backward", staticmethod(lambda ctx, *grads: (None,) * 4))
        assert trace_keys(adapted, "keep") != keep  # within an autograd.Function
    monkeypatch.setattr(recompute, "_source_hash", lambda: "another release")
    assert trace_keys(adapted, "keep") != keep


def test_a_layer_that_does_not_compile_goes_on_eager_and_says_why(adapted):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    wanted = gradient(adapted, LAYOUTS[0])
    layers = DecoderLayers(adapted, MemoryPolicy(), backend=broken)
    with layers:
        got = gradient(adapted, LAYOUTS[0])
    assert torch.equal(got, wanted)
    assert not layers.compiled and len(layers.notes) == 1
    assert "does not compile" in layers.notes[0] and "no compiler here" in layers.notes[0]


def test_the_model_is_as_it_was_afterwards(adapted):
    with DecoderLayers(adapted, MemoryPolicy(recompute_layers=3), compiled=False):
        pass
    assert not any(getattr(module, "gradient_checkpointing", False) for module in adapted.modules())


def test_tightening_ends_where_nothing_more_can_be_freed_in_a_run(adapted):
    for start in (
        MemoryPolicy(),
        MemoryPolicy(host_embeddings=True, micro_tokens=4096),
        MemoryPolicy(dequantized_layers=3),
    ):
        layers = DecoderLayers(adapted, start, compiled=False)
        seen = [layers.policy]
        while layers.reduce_memory():
            seen.append(layers.policy)
        assert len(set(seen)) == len(seen) < 20
        # embeddings and micro-batches as they were
        assert layers.policy == replace(start, recompute_layers=3, offloaded_layers=3, dequantized_layers=0)


def test_relief_is_what_the_policy_was_solved_for_and_else_tightening(adapted):
    layers = DecoderLayers(adapted, MemoryPolicy(offloaded_layers=1), compiled=False)

    def less():
        layers.policy = MemoryPolicy(offloaded_layers=2)
        return can_give

    layers.set_schedule((0, 0, 1, 1), less)
    can_give = True
    assert layers.reduce_slightly() and layers.policy == MemoryPolicy(offloaded_layers=2)
    can_give = False
    assert layers.reduce_slightly() and layers.policy == MemoryPolicy(offloaded_layers=2).next_smaller(len(layers))
    assert not layers.offload.schedule  # nor what was solved: both were made for the policy before
    while layers.reduce_slightly():
        assert layers.policy.recompute_layers or layers.policy.recompute_mlp_layers
    assert layers.policy == MemoryPolicy(recompute_layers=3, offloaded_layers=3)


class OnCard:
    """A frozen linear on a GPU with room for `room` copies, as far as keeping them goes."""

    def __init__(self, name, log, room):
        self.name, self.log, self.room = name, log, room
        self.weight, self.copies, self.row_scales = SimpleNamespace(is_cuda=True), (), True

    def keep_dense(self):
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.room.pop()
        self.copies = (self.name,)
        self.log.append(f"keep {self.name}")

    def drop_dense(self):
        if self.copies:
            self.copies = ()
            self.room.append(1)
            self.log.append(f"drop {self.name}")


def test_copies_are_freed_before_others_are_taken_and_none_is_made_twice(adapted):
    log, room = [], [1, 1, 1]
    layers = DecoderLayers(adapted, MemoryPolicy(dequantized_layers=3), compiled=False)
    layers.frozen = [[OnCard(name, log, room)] for name in "abc"]
    with layers:
        assert log == ["keep a", "keep b", "keep c"]
        log.clear()
        assert layers.reduce_memory()  # with no room for a single copy more
        assert log == ["drop b", "drop c"]
    assert log == ["drop b", "drop c", "drop a"]


def test_copies_that_do_not_fit_leave_none_behind(adapted):
    log = []
    layers = DecoderLayers(adapted, MemoryPolicy(dequantized_layers=3), compiled=False)
    layers.frozen = [[OnCard(name, log, [1][: name < "c"])] for name in "abc"]
    with pytest.raises(torch.OutOfMemoryError), layers:
        pass
    assert not any(linears[0].copies for linears in layers.frozen)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in adapted.modules())


def test_the_feed_forwards_widths_are_the_configs():
    assert feed_forward_widths(resolve_config(hidden=64, inner=160)) == {160, 320}


def resolve_config(hidden, inner):
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=hidden, intermediate_size=inner)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)
    config = resolve(flags={"base": str(base), "dropout": 0.0, "targets": "all-linear", "rank": 4}).config
    model = attach(load_backbone(config), config)
    stir(model)
    return model.train()


def gradient_on_gpu(model, lengths):
    model.zero_grad()
    with packed(model), torch.autocast("cuda", dtype=torch.bfloat16):
        summed_loss(model, collate(rows_of(lengths)).to("cuda")).backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [
        "recompute_mlp_layers=3",
        "recompute_layers=3",
        "offloaded_layers=3",
        "recompute_layers=1,recompute_mlp_layers=1,offloaded_layers=3",
    ],
)
def test_on_a_gpu_every_setting_has_the_gradient_of_keeping_everything(on_gpu, spec):
    for lengths in ((64, 200, 33), (128, 128)):
        with DecoderLayers(on_gpu, MemoryPolicy()):
            wanted = gradient_on_gpu(on_gpu, lengths)
        with DecoderLayers(on_gpu, MemoryPolicy.parse(spec, 3)) as layers:
            got = gradient_on_gpu(on_gpu, lengths)
        assert layers.notes == []
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2  # bf16; kernels are fused differently


@pytest.mark.gpu
def test_offloading_changes_no_bit_and_leaves_less_on_the_gpu(on_gpu):
    found = {}
    for spec in ("keep", "offloaded_layers=3"):
        with DecoderLayers(on_gpu, MemoryPolicy.parse(spec, 3)) as layers:
            gradient_on_gpu(on_gpu, (300, 200))
            torch.cuda.reset_peak_memory_stats()
            found[spec] = gradient_on_gpu(on_gpu, (300, 200)), layers.offload.sent_bytes
    assert torch.equal(found["keep"][0], found["offloaded_layers=3"][0])
    assert found["offloaded_layers=3"][1] > 0


@pytest.mark.gpu
def test_the_dry_run_finds_a_policy_within_the_budget(on_gpu):
    def loss_of(batch, share):
        with packed(on_gpu), torch.autocast("cuda", dtype=torch.bfloat16):
            return summed_loss(on_gpu, batch) * share

    work = Workload(
        batch_of=lambda tokens: collate(rows_of([128] * max(1, tokens // 128))).to("cuda"),
        loss_of=loss_of, max_length=4096, longest=128, step_tokens=4096.0, coming_bytes=0,
    )  # fmt: skip
    layers = DecoderLayers(on_gpu, MemoryPolicy())
    budget = torch.cuda.memory_reserved() + (1 << 30)
    found = find_policy(on_gpu, layers, work, budget, solves=True)
    assert found.peak_bytes <= budget and found.attempts[-1].fits
    assert all(weight.grad is None for weight in on_gpu.parameters())


@pytest.mark.gpu
def test_what_is_reckoned_of_a_recomputed_feed_forward_is_what_is_measured(on_gpu):
    batch = collate(rows_of([512] * 8)).to("cuda")

    def run_model():
        with packed(on_gpu), torch.autocast("cuda", dtype=torch.bfloat16):
            return summed_loss(on_gpu, batch)

    layers = DecoderLayers(on_gpu, MemoryPolicy())
    products = mlp_matmuls(layers, batch.tokens)
    keep, light = (measure_level(layers, run_model, level) for level in ("keep", "feed_forward"))
    assert products.size_bytes == keep.saved_bytes - light.saved_bytes > 0
    reckoned = products.recomputed(keep)
    assert 0.5 < reckoned.working_bytes / light.working_bytes < 2


@pytest.mark.gpu
def test_dense_weights_have_the_same_gradient_and_go_when_memory_is_short(on_gpu):
    lengths = (64, 200, 33)

    def kept(layers):
        return [sum(linear.dense is not None for linear in linears) for linears in layers.frozen]

    with DecoderLayers(on_gpu, MemoryPolicy()) as layers:
        assert kept(layers) == [0, 0, 0]
        wanted = gradient_on_gpu(on_gpu, lengths)
    with DecoderLayers(on_gpu, MemoryPolicy(dequantized_layers=3)) as layers:
        assert kept(layers) == [7, 7, 7]
        on_gpu.to("cuda")  # the Trainer does so
        assert kept(layers) == [7, 7, 7]
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        every = gradient_on_gpu(on_gpu, lengths)
        assert layers.notes == [] and layers.reduce_memory()
        assert kept(layers) == [7, 0, 0]
        some = gradient_on_gpu(on_gpu, lengths)
        assert layers.reduce_memory() and kept(layers) == [0, 0, 0]
        # layers with a copy and without one share their code
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(every, wanted) and torch.equal(some, wanted)
