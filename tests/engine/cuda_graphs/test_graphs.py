"""Micro-batches as CUDA graphs: what is recorded when, where gradients go, and on a GPU the same bits."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorafit.backbone import load_backbone
from lorafit.config import resolve
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import DecoderLayers, Graphs, VocabularyLoss, collate, packed
from lorafit.engine import cuda_graphs as graphs
from lorafit.engine import runtime as allocator
from lorafit.methods.lora import attach
from tiny_models import save_base, stir

LENGTHS = ((5, 9, 17), (8, 3, 20), (33, 12), (9, 9, 9), (40,))


def batch_of(lengths, seed=0):
    random = np.random.default_rng(seed)
    return collate([(random.integers(4, 250, length), np.arange(length) > 2) for length in lengths])


def layers_like(policy, **given):
    text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(attn_logit_softcapping=given.get("cap")))
    core = SimpleNamespace(dtype=given.get("dtype", torch.bfloat16), config=text)
    notes = []
    compiled = given.get("compiled", True)
    return SimpleNamespace(policy=policy, core=core, compiled=compiled, version=0, notes=notes, note=notes.append)


class Replay:
    """What a graph would do: the same work again, over what lies there now, adding to the gradients."""

    made = 0

    def __init__(self, frame, work):
        type(self).made += 1
        self.frame, self.work = frame, work

    def replay(self):
        self.frame.loss = self.frame.through(self.work)


@pytest.fixture
def recorded(monkeypatch):
    def record(self, frame, work):
        frame.graph = Replay(frame, work)

    Replay.made = 0
    monkeypatch.setattr(Graphs, "_record", record)
    monkeypatch.setattr(Graphs, "_finish", lambda self: None)
    return Replay


WEIGHT = torch.nn.Parameter(torch.tensor([2.0]))


def work(batch, share):
    """A loss whose gradient tells the tokens that took part."""
    counted = (batch.targets >= 0).sum()
    loss = (WEIGHT * batch.ids.sum() * counted).sum() * share
    loss.backward()
    return loss.detach()


@pytest.fixture
def small():
    WEIGHT.grad = None
    return Graphs(layers_like(MemoryPolicy(cuda_graph_max_tokens=64)), longest=40, trained=[WEIGHT])


def expected(batch, share):
    return float(batch.ids.sum() * batch.supervised * share)


def test_the_second_of_a_bucket_is_recorded_and_replayed_with_its_own_rows_and_share(small, recorded):
    for number, seed in enumerate(range(4)):
        WEIGHT.grad = None
        batch = batch_of((20, 12), seed)
        loss = small.run(batch, share=0.5 + seed, work=work)
        assert float(loss) == pytest.approx(2 * expected(batch, 0.5 + seed), rel=1e-6)
        assert float(WEIGHT.grad) == pytest.approx(expected(batch, 0.5 + seed), rel=1e-6)
        assert (recorded.made, small.replays) == (min(number, 1), number)


def test_gradients_add_up_over_a_step_whoever_made_them(small, recorded):
    graphable, large = batch_of((20, 12)), batch_of((60, 50))
    small.run(graphable, 1.0, work)
    for order in ((graphable, large, graphable), (large, graphable, graphable)):
        WEIGHT.grad = None
        for batch in order:
            small.run(batch, 1.0, work)
        assert float(WEIGHT.grad) == pytest.approx(sum(expected(batch, 1.0) for batch in order), rel=1e-6)


def test_gradients_of_a_step_outlive_the_graphs_that_made_them(small, recorded):
    batch = batch_of((20, 12))
    for number in range(1, 4):
        small.run(batch, 1.0, work)
        small.forget()
        assert float(WEIGHT.grad) == pytest.approx(number * expected(batch, 1.0), rel=1e-6)


def test_a_loss_that_was_returned_is_not_overwritten_by_the_next(small, recorded):
    first, second = batch_of((20, 12), 1), batch_of((20, 12), 2)
    losses = [small.run(batch, 1.0, work) for batch in (first, first, second)]
    assert [float(loss) for loss in losses] == [2 * expected(batch, 1.0) for batch in (first, first, second)]


def test_graphs_are_made_anew_when_what_they_refer_to_has_moved(small, recorded):
    batch = batch_of((20, 12))
    for change in (
        lambda: None,
        lambda: setattr(small.layers, "version", 1),
        lambda: setattr(small.layers, "policy", MemoryPolicy(cuda_graph_max_tokens=64, dequantized_layers=1)),
        lambda: setattr(WEIGHT, "data", WEIGHT.data.clone()),
    ):
        change()
        before = recorded.made
        for _ in range(3):
            small.run(batch, 1.0, work)
        assert recorded.made == before + 1


def test_buckets_that_were_not_used_for_long_are_let_go(small, recorded, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_BUCKETS", 2)
    small.layers.policy = MemoryPolicy(cuda_graph_max_tokens=4000)
    for tokens in (30, 300, 30, 900, 30):
        small.run(batch_of((tokens, tokens + 1)), 1.0, work)
    assert len(small._frames) == 2 and recorded.made == 1 and small.replays == 2


def test_graphs_give_their_memory_back_once_and_are_recorded_again(small, recorded):
    batch = batch_of((20, 12))
    assert not small.give_back()
    for made in (1, 2):
        for _ in range(3):
            small.run(batch, 1.0, work)
        assert recorded.made == made
        assert small.give_back() and not small.give_back()


def test_a_policy_without_graphs_lets_go_of_them(small, recorded):
    batch = batch_of((20, 12))
    for _ in range(3):
        small.run(batch, 1.0, work)
    small._arena = object()
    small.layers.policy, before = MemoryPolicy(), small.replays
    WEIGHT.grad = None
    small.run(batch, 1.0, work)
    assert not small._frames and small._arena is None and not small._gradients and before == small.replays == 2
    assert float(WEIGHT.grad) == expected(batch, 1.0)


def test_memory_that_runs_out_while_recording_is_the_callers_to_make_room_for(small, monkeypatch):
    def record(self, work):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Graphs, "_recorded", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    batch = batch_of((20, 12))
    small.run(batch, 1.0, work)
    for _ in range(2):  # later ones find as little room
        with pytest.raises(torch.OutOfMemoryError):
            small.run(batch, 1.0, work)
        assert not small.failed and not small._frames and small.layers.notes == []
        small.run(batch, 1.0, work)


@pytest.mark.parametrize(
    "layers",
    [
        layers_like(MemoryPolicy()),
        layers_like(MemoryPolicy(cuda_graph_max_tokens=8)),
        layers_like(MemoryPolicy(cuda_graph_max_tokens=64, recompute_layers=1)),
        layers_like(MemoryPolicy(cuda_graph_max_tokens=64, offloaded_layers=1)),
        layers_like(MemoryPolicy(cuda_graph_max_tokens=64), dtype=torch.float32),
        layers_like(MemoryPolicy(cuda_graph_max_tokens=64), cap=50.0),
        layers_like(MemoryPolicy(cuda_graph_max_tokens=64), compiled=False),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(layers, recorded):
    plain = Graphs(layers, longest=40, trained=[WEIGHT])
    WEIGHT.grad, batch, seen = None, batch_of((20, 12)), []
    for _ in range(3):
        plain.run(batch, 1.0, lambda found, share: seen.append(found.tokens) or work(found, share))
    assert seen == [32] * 3 and recorded.made == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where recording works")
def test_where_recording_fails_training_goes_on_and_says_so(small):
    batch = batch_of((20, 12))
    seen = []
    for _ in range(4):
        WEIGHT.grad = None
        loss = small.run(batch, 1.0, lambda found, share: seen.append(found.tokens) or work(found, share))
        assert float(loss) == 2 * float(WEIGHT.grad) == 2 * expected(batch, 1.0)
    assert small.failed and small.replays == 0
    assert set(seen) == {64}  # filled up as before: a run that goes on and can record has the same bits
    assert len(small.layers.notes) == 1 and "cannot be recorded as CUDA graphs (" in small.layers.notes[0]


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    base = save_base(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=3)
    config = resolve(flags={"base": str(base), "dropout": 0.1, "targets": "all-linear", "rank": 4}).config
    model = attach(load_backbone(config), config)
    stir(model)
    return model.train()


def trained_weights(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def steps_on_gpu(model, policy, *, records=True, spoil=None):
    """Losses and gradients of a few steps of two micro-batches, with dropout; and the layers and graphs afterwards."""
    loss, found = VocabularyLoss.expected(model), []

    def there_and_back(batch, share):
        with packed(model), torch.autocast("cuda", dtype=torch.bfloat16):
            value = loss.summed(model, batch, share)
        if spoil is not None and torch.cuda.is_current_stream_capturing():
            spoil()
        value.backward()
        return value.detach()

    torch.manual_seed(0)
    with DecoderLayers(model, policy) as layers:
        made = Graphs(layers, longest=40, trained=trained_weights(model))
        if not records:
            made._record = lambda frame, work: None
        for seed in range(6):
            model.zero_grad()
            pair = [batch_of(lengths, seed) for lengths in (LENGTHS[seed % 5], LENGTHS[(seed + 1) % 5])]
            total = sum(made.run(batch, 1 / (50 + seed), there_and_back) for batch in pair)
            found.append(
                torch.cat([total[None], *(weight.grad.flatten() for weight in trained_weights(model))]).clone()
            )
        model.zero_grad()
    return found, layers, made


@pytest.mark.gpu
@pytest.mark.parametrize(
    "policy",
    [
        MemoryPolicy(cuda_graph_max_tokens=512),
        MemoryPolicy(cuda_graph_max_tokens=512, recompute_mlp_layers=3),
        MemoryPolicy(cuda_graph_max_tokens=512, dequantized_layers=3),
    ],
)
def test_a_replayed_micro_batch_has_the_bits_of_one_that_was_not_recorded(on_gpu, policy):
    found, layers, made = steps_on_gpu(on_gpu, policy)
    wanted, _, never = steps_on_gpu(on_gpu, policy, records=False)
    assert made.replays >= 6 and never.replays == 0 and layers.notes == []
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))
    assert all(float(got.norm()) > 0 for got in found)


@pytest.mark.gpu
def test_a_filled_micro_batch_has_the_gradient_of_the_plain_one(on_gpu):
    on_gpu.eval()  # without dropout: masks are drawn over other shapes
    found, _, made = steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512))
    wanted, _, _ = steps_on_gpu(on_gpu, MemoryPolicy())
    on_gpu.train()
    assert made.replays >= 6
    for got, want in zip(found, wanted, strict=True):
        assert float((got - want).norm() / want.norm()) < 2e-2


@pytest.mark.gpu
def test_a_recording_that_breaks_leaves_training_as_it_was(on_gpu):
    found, layers, made = steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512), spoil=torch.cuda.synchronize)
    assert made.failed and made.replays == 0 and len(layers.notes) == 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    plain, _, _ = steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512), records=False)
    # filled up in either, and dropout goes on where it stood
    assert all(torch.equal(got, want) for got, want in zip(found, plain, strict=True))
    assert all(bool(got.isfinite().all()) and float(got.norm()) > 0 for got in found)
    again, _, _ = steps_on_gpu(on_gpu, MemoryPolicy())  # a GPU that is left unharmed
    assert all(bool(got.isfinite().all()) for got in again)


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.gpu
def test_after_memory_ran_out_while_recording_the_same_graphs_can_be_made_again(on_gpu):
    with pytest.raises(torch.OutOfMemoryError):
        steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512), spoil=no_memory)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    found, _, made = steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512))
    wanted, _, _ = steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512), records=False)
    assert made.replays >= 6
    assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


@pytest.fixture(params=[allocator.FIXED, allocator.GROWING])
def blocks(request):
    """What other blocks than those of recordings are: as before, and as `let_blocks_grow` has them."""
    allocator._set(request.param)
    yield
    allocator._set(allocator.FIXED)


@pytest.mark.gpu
def test_graphs_that_were_let_go_are_recorded_again(on_gpu, blocks):
    loss = VocabularyLoss.expected(on_gpu)

    def there_and_back(batch, share):
        with packed(on_gpu), torch.autocast("cuda", dtype=torch.bfloat16):
            value = loss.summed(on_gpu, batch, share)
        value.backward()
        return value.detach()

    with DecoderLayers(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512)) as layers:
        made = Graphs(layers, longest=40, trained=trained_weights(on_gpu), arena_bytes=1 << 26)
        for _ in range(2):
            for _ in range(3):
                made.run(batch_of(LENGTHS[0]), 1.0, there_and_back)
            made.forget()
    assert made.replays == 4 and not made.failed and layers.notes == []


@pytest.mark.gpu
def test_graphs_give_their_memory_back(on_gpu, blocks):
    torch.cuda.synchronize()
    _, _, made = steps_on_gpu(on_gpu, MemoryPolicy(cuda_graph_max_tokens=512))
    before = torch.cuda.memory_reserved()
    made.forget()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before
