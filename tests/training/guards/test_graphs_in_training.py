"""Training with graphs, on a CPU that replays by doing the same again: the trainer's part of it.

What a graph is on a GPU stands in tests/engine/test_graphs.py.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine import Graphs, Segments
from lorafit.engine import cuda_graphs as graphs
from lorafit.engine.cuda_graphs import Bucket
from lorafit.methods.lora import attach
from lorafit.training import EventLog, TunedMemory
from tiny_models import save_base

ROWS = encoded_rows(9, 12, 15, 30, 31, 32, 20, 8, 11, 26, 5, 17, 40, 22, 6, 28)
STEPS = 12


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


class Layers:
    """What graphs and the retry after an out-of-memory need of the decoder layers."""

    def __init__(self, policy):
        self.policy, self.version, self.notes = policy, 0, []
        self.note = self.notes.append

    def reduce_memory(self):
        tighter = self.policy.next_smaller(2)
        self.policy = tighter or self.policy
        return tighter is not None


@pytest.fixture
def replaying(monkeypatch):
    """Graphs on a CPU, whose attention needs the rows in groups; a replay is the same work again."""
    batch_of = Bucket.batch_of

    def grouped(self, filled):
        batch = batch_of(self, filled)
        lengths = np.diff(batch.segments.cu_seqlens.numpy())
        return replace(batch, segments=Segments.of_lengths(lengths[lengths > 0].tolist()))

    def record(self, frame, work):
        def replay():
            frame.loss = frame.through(work)

        frame.graph = SimpleNamespace(replay=replay)

    monkeypatch.setattr(Bucket, "batch_of", grouped)
    monkeypatch.setattr(graphs, "recordable", lambda layers: True)
    monkeypatch.setattr(Graphs, "_record", record)
    monkeypatch.setattr(Graphs, "_finish", lambda self: None)


def trained(base, folder, policy=None, when=lambda: False, **given):
    """Losses, gradient norms and final adapters of a short run; and its trainer."""
    sizes = {"max_length": 4096, "examples_per_step": 4, "max_steps": STEPS, "save_steps": 100, "lr": 1e-2}
    config = settings(base=base, **sizes | given)
    model = attach(load_backbone(config, device="cpu"), config)
    memory = TunedMemory(config.max_length)
    if policy is not None:
        layers, trained = Layers(policy), [weight for weight in model.parameters() if weight.requires_grad]
        memory = TunedMemory(config.max_length, layers, Graphs(layers, int(ROWS.lengths.max()), trained))
    events = EventLog(folder / "events.jsonl")
    trainer = training_loop(model, config, ROWS, None, folder, events=events, memory=memory)

    def full(*unused):
        if when():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model.get_base_model().model.layers[-1].register_forward_hook(full)
    trainer.run()
    logged = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    numbers = [number for entry in logged for number in (entry["loss"], entry["grad_norm"])]
    return numbers, torch.cat([weight.detach().flatten() for weight in trainer.trained]), trainer


@pytest.mark.parametrize("micro_tokens", [4096, 64])
def test_losses_gradients_and_adapters_are_those_of_training_without(base, tmp_path, replaying, micro_tokens):
    wanted, weights, _ = trained(base, tmp_path / "plain", max_length=micro_tokens)
    # some micro-batches are too large for a graph, and add to the same gradients
    found, got, trainer = trained(
        base, tmp_path / "graphs", MemoryPolicy(cuda_graph_max_tokens=80), max_length=micro_tokens
    )
    assert trainer.memory_retry.graphs.replays >= 4
    assert found == pytest.approx(wanted, rel=1e-4)
    assert float((got - weights).norm() / weights.norm()) < 1e-4


def test_a_run_that_runs_out_of_memory_gives_graphs_up_and_goes_on(base, tmp_path, replaying):
    wanted, weights, _ = trained(base, tmp_path / "plain")
    calls = iter(range(10**6))
    found, got, trainer = trained(
        base, tmp_path / "short", MemoryPolicy(cuda_graph_max_tokens=512), when=lambda: next(calls) == 7
    )
    assert trainer.memory_retry.graphs.layers.policy == MemoryPolicy() and not trainer.memory_retry.graphs._frames
    assert [event.kind for event in trainer.events.seen] == ["out_of_memory"]
    assert "no CUDA graphs from here on" in trainer.events.seen[0].message
    assert found == pytest.approx(wanted, rel=1e-4)
    assert float((got - weights).norm() / weights.norm()) < 1e-4


def test_dropout_draws_for_every_micro_batch(base, tmp_path, replaying):
    found, _, trainer = trained(base, tmp_path, MemoryPolicy(cuda_graph_max_tokens=512), dropout=0.5, lr=1e-9)
    assert trainer.memory_retry.graphs.replays >= 4
    assert len(set(found[::2])) == len(found[::2])


def test_evaluation_and_saving_that_run_out_of_memory_have_the_graphs_memory(base, tmp_path, replaying):
    _, _, trainer = trained(base, tmp_path, MemoryPolicy(cuda_graph_max_tokens=512))
    for short_of in (
        lambda work: trainer.memory_retry.evaluate(STEPS, ROWS, lambda batch: work() or torch.zeros(()), lambda: False),
        lambda work: trainer.memory_retry.save(STEPS, work),
    ):
        given = []

        def work(given=given):
            given.append(bool(trainer.memory_retry.graphs._frames))
            if given[-1]:
                raise torch.OutOfMemoryError("CUDA out of memory")

        trainer.run()
        assert trainer.memory_retry.graphs._frames
        short_of(work)
        assert given[:2] == [True, False] and trainer.memory_retry.graphs.layers.policy == MemoryPolicy(
            cuda_graph_max_tokens=512
        )
