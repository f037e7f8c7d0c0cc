from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafit.backbone import quantize
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.autotune import problem
from lorafit.engine.autotune.measure import LevelCost, MlpMatmuls
from lorafit.engine.autotune.problem import Problem, Workload, dequantizable_layers
from lorafit.memory.layer_costs import LayerCosts, Link, Split
from lorafit.memory.solver import Room
from turned_layers import TurnedLayers

MB = 1 << 20
COSTS = LayerCosts(
    layers=32, kept_bytes=92 * MB, feed_forward_bytes=36 * MB, whole_bytes=8 * MB, forward_s=0.005, backward_s=0.008,
    recompute_feed_forward_s=0.0027, recompute_layer_s=0.005, kept_working_bytes=100 * MB,
    feed_forward_working_bytes=156 * MB, whole_working_bytes=184 * MB,
)  # fmt: skip


def turned(room, costs=COSTS, max_length=1024):
    work = Workload(None, None, max_length=max_length, longest=1024, step_tokens=1024.0, coming_bytes=0)
    layers = TurnedLayers()
    Problem(costs, room, 1024, work).apply(layers)
    return layers


def test_layers_all_at_one_level_win_where_a_mixture_gains_hardly_anything():
    room = Room(COSTS.layers * COSTS.feed_forward_bytes + 220 * MB)  # one or two layers could keep everything
    assert turned(room).policy == MemoryPolicy(recompute_mlp_layers=32)


def test_a_mixture_that_gains_is_compiled_at_both_levels():
    room = Room(COSTS.layers * (COSTS.feed_forward_bytes + COSTS.kept_bytes) // 2)
    policy = turned(room).policy
    assert 0 < policy.recompute_mlp_layers < 32 and not policy.recompute_layers


def test_one_level_for_all_still_fits_the_room():
    link = Link(6e9, 6e9)
    room = Room(600 * MB, link=link)
    layers = turned(room)
    assert layers.policy.recompute_mlp_layers == 32 and layers.policy.offloaded_layers
    assert len(layers.schedule) == len(layers) + 1


def test_a_micro_batch_that_was_halved_to_be_measured_is_said():
    assert turned(Room(64 << 30)).policy.micro_tokens is None
    assert turned(Room(64 << 30), max_length=4096).policy.micro_tokens == 1024


def test_where_nothing_fits_everything_is_recomputed_and_sent_away():
    layers = turned(Room(1))
    assert layers.policy == MemoryPolicy(
        recompute_layers=32, offloaded_layers=32, host_embeddings=True, micro_tokens=1024
    )


def test_a_run_that_barely_fits_gives_up_as_little_as_its_policy_was_solved_for():
    link = Link(6e9, 6e9)
    layers = turned(Room(COSTS.layers * COSTS.kept_bytes - 200 * MB, link=link))
    solved, schedule = layers.policy, layers.schedule
    layers.policy = replace(solved, host_embeddings=True, micro_tokens=2048)  # as the dry run left them
    assert layers.less()
    relieved = layers.policy
    assert relieved.host_embeddings and relieved.micro_tokens == 2048
    assert (
        solved.offloaded_layers < relieved.offloaded_layers <= solved.offloaded_layers + 4
        and layers.schedule != schedule
    )
    assert layers.less() and layers.policy.offloaded_layers > relieved.offloaded_layers  # and again


def relieved(room, costs=COSTS, times=9):
    """The policies that a run goes through which stays tight, the solved one first, each with its schedule."""
    layers = turned(room, costs)
    seen = [(layers.policy, layers.schedule)]
    while len(seen) <= times and layers.less():
        seen.append((layers.policy, layers.schedule))
    return seen


def recomputed(policy):
    return policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers


@pytest.mark.parametrize("room_mb", [-600, -100, 0, 30])
def test_embeddings_that_left_count_where_no_other_room_is(room_mb):
    room = Room(room_mb * MB, link=Link(6e9, 6e9), embedding_bytes=1050 * MB)
    seen = relieved(room)
    assert len(seen) > 1 and all(policy.host_embeddings for policy, _ in seen)
    given_up = [(recomputed(policy), policy.offloaded_layers, sum(schedule)) for policy, schedule in seen]
    assert given_up == sorted(set(given_up))


def test_a_tighter_schedule_of_the_same_policy_is_a_relief():
    (first, before), (second, after) = relieved(Room(700 * MB, link=Link(6e9, 6e9)), times=1)
    assert first == second and first.offloaded_layers
    assert sum(after) > sum(before)  # layers leave sooner, and come back later


def test_what_has_room_to_spare_in_the_reckoning_gives_up_some_of_what_it_uses():
    seen = [policy for policy, _ in relieved(Room(COSTS.layers * COSTS.kept_bytes * 3, link=Link(50e9, 50e9)))]
    assert (
        seen[0] == MemoryPolicy() and seen[1].offloaded_layers and not seen[1].recompute_mlp_layers
    )  # of one level, as it was compiled


def test_a_run_is_not_turned_to_other_micro_batches_or_embeddings_in_its_middle():
    room = Room(COSTS.layers * COSTS.whole_bytes + 200 * MB, link=None, embedding_bytes=500 * MB, embedding_s=0.1)
    seen = relieved(room)
    assert seen[0][0].recompute_layers and len(seen) == 1  # only the embeddings could go
    link = relieved(replace(room, link=Link(6e9, 6e9)))
    assert len(link) > 1 and not any(policy.host_embeddings or policy.micro_tokens for policy, _ in link)


def peak_of(costs, policy, schedule):
    """The fullest moment of a micro-batch whose offloaded layers are on the GPU when `schedule` says so."""
    split = Split(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers)
    saved = [costs.saved[split.level(layer)] for layer in range(costs.layers)]
    there = (
        sum(size for index, size in enumerate(saved[: layer + 1]) if index >= min(policy.offloaded_layers, first))
        for layer, first in enumerate(schedule)
    )
    return max(size + split.beside(layer) for layer, size in enumerate(there))


@st.composite
def problems(draw):
    mb, some = st.integers(0, 400), st.floats(0.1, 1.0)
    layers, kept = draw(st.sampled_from([1, 2, 8, 32, 60])), draw(st.integers(4, 200))
    light = draw(st.integers(2, kept))
    forward = draw(st.floats(0.001, 0.02))
    costs = LayerCosts(
        layers=layers, kept_bytes=kept * MB, feed_forward_bytes=light * MB,
        whole_bytes=draw(st.integers(1, light)) * MB,
        forward_s=forward, backward_s=2 * forward, recompute_feed_forward_s=draw(some) * forward,
        recompute_layer_s=forward, kept_working_bytes=draw(mb) * MB, feed_forward_working_bytes=draw(mb) * MB,
        whole_working_bytes=draw(mb) * MB, loss_bytes=draw(mb) * MB, loss_s=0.01,
    )  # fmt: skip
    room = Room(
        round(draw(st.floats(-0.1, 1.2)) * layers * kept + draw(st.integers(-300, 300))) * MB,
        link=draw(st.sampled_from([None, Link(6e9, 6e9), Link(50e9, 40e9)])),
        embedding_bytes=draw(st.sampled_from([0, 1050])) * MB, embedding_s=0.002,
    )  # fmt: skip
    longest, mean = draw(st.sampled_from([256, 2048])), draw(st.sampled_from([1024.0, 6000.0]))
    work = Workload(None, None, max_length=2048, longest=longest, step_tokens=mean, coming_bytes=0)
    return Problem(costs, room, 2048, work)


@settings(max_examples=60)
@given(problems())
def test_relief_after_relief_a_run_needs_less_until_there_is_none(problem):
    layers = TurnedLayers(problem.costs.layers)
    problem.apply(layers)
    for _ in range(400):
        before, schedule = layers.policy, layers.schedule
        if layers.less is None or not layers.less():
            assert (layers.policy, layers.schedule) == (before, schedule)
            return
        policy, now = layers.policy, layers.less.func.__self__
        assert (policy.micro_tokens, policy.host_embeddings) == (before.micro_tokens, before.host_embeddings)
        costs = now._costs_with(policy)
        peak = peak_of(costs, policy, layers.schedule)
        assert peak <= min(now._room_with(policy).device_bytes, peak_of(costs, before, schedule))
    raise AssertionError("it never ends")


def test_weights_lie_unpacked_as_far_as_the_room_goes_from_the_first_layer_on():
    linears = [quantize(torch.randn(64, 64), compute_dtype=torch.bfloat16) for _ in range(4)]
    each = 64 * 64 * 2
    layers = SimpleNamespace(frozen=[linears[:2], linears[2:3], linears[3:]])
    for spare, wanted in ((-1, 0), (2 * each - 1, 0), (2 * each, 1), (3 * each, 2), (99 * each, 3)):
        assert dequantizable_layers(layers, spare) == wanted
    assert dequantizable_layers(SimpleNamespace(frozen=[[], []]), 1 << 30) == 0  # a base in 16 bits


def test_where_one_layer_does_not_fit_unpacked_weights_go_before_anything_else(monkeypatch):
    tried = []
    cost = LevelCost(saved_bytes=92, working_bytes=100, forward_s=0.005, backward_s=0.008, launch_s=0.001)

    def measure(layers, run, level, on_compile):
        tried.append(layers.policy.dequantized_layers)
        return cost if len(tried) > 1 else None

    monkeypatch.setattr(problem, "measure_level", measure)
    monkeypatch.setattr(problem, "release_memory", lambda: None)
    layers = TurnedLayers()
    layers.policy = MemoryPolicy(dequantized_layers=32)
    work = Workload(lambda tokens: tokens, print, max_length=1024, longest=1024, step_tokens=1024.0, coming_bytes=0)
    assert problem._measured(None, layers, work, "keep") == (1024, cost)
    assert tried == [32, 0] and layers.policy.dequantized_layers == 0


KEPT = LevelCost(saved_bytes=92 * MB, working_bytes=100 * MB, forward_s=0.0015, backward_s=0.0017, launch_s=0.0014)


@pytest.mark.parametrize(
    ("cost", "mean", "spare_mb", "records", "graphs"),
    [
        (KEPT, 900.0, 4000, True, 1024),
        (KEPT, 900.0, 4000, False, 0),
        (KEPT, 900.0, 3000, True, 0),  # a second micro-batch's memory is not there
        # the largest waits for the GPU, the mean one does not
        (replace(KEPT, backward_s=0.0051), 500.0, 4000, True, 521),
        (replace(KEPT, backward_s=0.0051), 700.0, 4000, True, 0),
    ],
)
def test_micro_batches_that_wait_for_the_processor_run_as_graphs(monkeypatch, cost, mean, spare_mb, records, graphs):
    batch = SimpleNamespace(tokens=1024)
    layers = TurnedLayers()
    layers.frozen, layers.compiled, layers.policy = [], True, MemoryPolicy()
    monkeypatch.setattr(problem, "recordable", lambda layers: records)
    monkeypatch.setattr(problem, "_levels", lambda *unused: (batch, cost, cost))
    monkeypatch.setattr(problem, "_loss_bytes", lambda *unused: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    everything = 32 * cost.saved_bytes + cost.working_bytes
    budget = round((everything + spare_mb * MB + problem.SLACK_BYTES) / (1 - problem.LOST_SHARE))
    work = Workload(lambda tokens: batch, None, max_length=1024, longest=256, step_tokens=mean, coming_bytes=0)
    assert problem.measured_problem(None, layers, work, budget) is None
    assert layers.policy == MemoryPolicy(cuda_graph_max_tokens=graphs)


def test_less_room_is_a_tighter_policy():
    work = Workload(None, None, max_length=1024, longest=1024, step_tokens=1024.0, coming_bytes=0)
    loose = Problem(COSTS, Room(4 << 30), 1024, work)
    first, second = TurnedLayers(), TurnedLayers()
    loose.apply(first)
    loose.less(3 << 30).apply(second)
    assert first.policy == MemoryPolicy() and second.policy.recompute_mlp_layers + second.policy.recompute_layers > 0


def test_what_is_left_out_and_kept_in_again_is_what_it_was():
    keep = LevelCost(saved_bytes=92, working_bytes=100, forward_s=0.005, backward_s=0.008, launch_s=0.001)
    products = MlpMatmuls(56, 0.0027)
    light = products.recomputed(keep)
    assert (light.saved_bytes, light.working_bytes) == (36, 156)
    assert light.backward_s == pytest.approx(0.0107)
    again = products.kept(light)
    assert replace(again, backward_s=round(again.backward_s, 9)) == keep
