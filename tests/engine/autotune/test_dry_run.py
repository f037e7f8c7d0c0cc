"""Which policies are tried, one after another, and which one a run ends up with."""

import gc
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.engine.autotune import dry_run
from lorafit.engine.autotune.problem import Problem, Workload
from lorafit.memory.layer_costs import LayerCosts, Link
from lorafit.memory.solver import Room
from turned_layers import TurnedLayers

MB = 1 << 20
COSTS = LayerCosts(
    layers=32, kept_bytes=184 * MB, feed_forward_bytes=72 * MB, whole_bytes=16 * MB, forward_s=0.005, backward_s=0.008,
    recompute_feed_forward_s=0.0027, recompute_layer_s=0.005, kept_working_bytes=400 * MB,
    feed_forward_working_bytes=512 * MB, whole_working_bytes=584 * MB, loss_bytes=304 * MB,
)  # fmt: skip
TIGHTEST = "recompute_layers=32,offloaded_layers=32,host_embeddings=on,micro_tokens=2048"
WORK = Workload(None, None, max_length=2048, longest=2048, step_tokens=2048.0, coming_bytes=80 * MB)
BUDGET = 6144 * MB
START = Problem(COSTS, Room(BUDGET, 64 << 30, Link(50e9, 50e9)), 2048, WORK)


@pytest.fixture
def attempts(monkeypatch):
    """The attempts from a problem with so much room, on a GPU where whatever stands takes `standing` bytes."""

    def made(room_mb, standing_mb, needs_mb):
        def attempt(trials, problem):
            peak = (standing_mb + needs_mb(layers.policy)) * MB + WORK.coming_bytes
            fits = peak <= BUDGET
            return dry_run.Attempt(str(layers.policy), problem.room.device_bytes, peak, peak, 0, (0, 0), 0.0, fits)

        monkeypatch.setattr(dry_run.Trials, "attempt", attempt)
        layers = TurnedLayers()
        problem = Problem(COSTS, Room(room_mb * MB, 64 << 30, Link(50e9, 50e9)), 2048, WORK)
        return list(dry_run.Trials(None, layers, WORK, BUDGET).attempts(problem)), layers

    return made


def test_where_the_tightest_policy_leaves_room_a_faster_one_is_taken(attempts):
    tried, layers = attempts(500, 4800, lambda policy: 616 if policy.recompute_layers else 950)
    assert tried[0].policy == TIGHTEST and len(tried) == 2
    assert tried[-1].fits and not layers.policy.recompute_layers and layers.policy.offloaded_layers and layers.schedule
    assert tried[-1].room_bytes == (616 + 6144 - 80 - 4800 - 616 - 48) * MB


def test_where_that_does_not_fit_after_all_it_is_the_tightest_again(attempts):
    tried, layers = attempts(500, 4800, lambda policy: 616 if policy.recompute_layers else 1500)
    fits = [attempt.fits for attempt in tried]
    assert fits[0] and fits[-1] and not any(fits[1:-1]) and 3 <= len(fits) <= 2 + dry_run.GROWING_TRIES
    assert str(layers.policy) == tried[-1].policy == TIGHTEST and layers.schedule == ()


def test_after_a_misfit_that_led_to_the_tightest_policy_the_room_between_is_tried(attempts):
    tried, layers = attempts(
        900, 4800, lambda policy: 616 if policy.recompute_layers == 32 else policy.offloaded_layers and 1600
    )
    assert not tried[0].fits and tried[1].policy == TIGHTEST and tried[1].fits
    assert tried[1].room_bytes < tried[2].room_bytes < tried[0].room_bytes
    assert str(layers.policy) == tried[-1].policy == TIGHTEST and tried[-1].fits
    fitting, layers = attempts(900, 4800, lambda policy: 1600 if str(policy) == tried[0].policy else 616)
    assert fitting[-1].fits and not layers.policy.recompute_layers and len(fitting) >= 3


def test_where_it_leaves_none_nothing_else_is_tried(attempts):
    tried, layers = attempts(500, 5440, lambda policy: 616)
    assert [attempt.policy for attempt in tried] == [TIGHTEST] == [str(layers.policy)]


def test_a_policy_that_was_solved_is_not_solved_again_because_it_left_room(attempts):
    tried, layers = attempts(900, 3000, lambda policy: 900)
    assert len(tried) == 1 and tried[0].fits and not layers.policy.recompute_layers


@cache
def taken_in_each_room(link_gbs):
    """Bytes and seconds that a step takes by the policies of rooms of 0.6 to 6 GB."""
    link = Link(link_gbs * 1e9, link_gbs * 1e9)
    problems = [replace(START, room=Room(mb * MB, 64 << 30, link)) for mb in range(600, 6144, 40)]
    return [problem._taken() for problem in problems if problem.has_policy]


@settings(max_examples=60, deadline=None)
@given(
    errs=st.floats(0.7, 1.8),
    standing_mb=st.integers(1500, 4500),
    crowded=st.floats(0.0, 0.06),
    link_gbs=st.sampled_from([3, 12, 50]),
    room_share=st.floats(0.3, 1.0),
)
@pytest.mark.slow
def test_a_policy_that_shrank_rests_within_a_layer_of_the_fastest_that_fits(
    errs, standing_mb, crowded, link_gbs, room_share
):
    """The GPU takes `errs` times what is reckoned, and asks again where less than `crowded` of it is left."""
    limit = BUDGET * (1 - crowded)

    def peak_of(taken_bytes):
        return standing_mb * MB + round(errs * taken_bytes)

    def attempt(trials, problem):
        peak = peak_of(problem._taken()[0])
        taken = min(peak, BUDGET) if peak < 1.1 * BUDGET else peak
        return dry_run.Attempt(str(layers.policy), problem.room.device_bytes, taken, taken, 0, (0,), 0.0, peak <= limit)

    room = Room(round(room_share * (BUDGET - standing_mb * MB)), 64 << 30, Link(link_gbs * 1e9, link_gbs * 1e9))
    spared = limit - errs * COSTS.kept_bytes - dry_run.SLACK_BYTES
    reachable = [seconds for taken, seconds in taken_in_each_room(link_gbs) if peak_of(taken) <= spared]
    smallest = replace(START, room=replace(room, device_bytes=MB))
    assume(peak_of(smallest._taken()[0]) <= limit)
    layers = TurnedLayers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run.Trials, "attempt", attempt)
        tried = list(dry_run.Trials(None, layers, WORK, BUDGET).attempts(replace(START, room=room)))
    assert tried[-1].fits and tried[-1].policy == str(layers.policy)
    if len(tried) > 1 and tried[-1].peak_bytes < (1 - dry_run.UNUSED_SHARE) * BUDGET and reachable:
        rests = replace(START, room=replace(room, device_bytes=tried[-1].room_bytes))
        assert rests._taken()[1] <= min(reachable) * 1.02


def test_shrinking_that_went_too_far_is_taken_back(monkeypatch):
    """6.5 GiB of 8B on an H200: it asked again while it was under its budget, and rested at 5.24 GiB."""
    start = replace(START, room=Room(3050 * MB))  # no link: bytes that are saved stay

    def attempt(trials, problem):
        peak = 3000 * MB + problem._taken()[0]
        fits = len(tried) > 1
        return dry_run.Attempt(str(layers.policy), problem.room.device_bytes, peak, peak, 0, (0,), 0.0, fits)

    monkeypatch.setattr(dry_run.Trials, "attempt", attempt)
    tried, layers = [], TurnedLayers()
    for made in dry_run.Trials(None, layers, WORK, BUDGET).attempts(start):
        tried.append(made)
    shrunk, rests = tried[2], tried[-1]
    assert shrunk.peak_bytes < (1 - dry_run.UNUSED_SHARE) * BUDGET
    assert shrunk.peak_bytes < rests.peak_bytes < tried[1].peak_bytes  # which asked again
    assert rests.policy == str(layers.policy)
    recomputed = [MemoryPolicy.parse(made.policy, 32).recompute_layers for made in (shrunk, rests)]
    assert recomputed[1] < recomputed[0]


class Gpu:
    """A GPU whose allocator holds, after each pass, what is listed in MB; None: it asked again and has 3,000."""

    def __init__(self, monkeypatch, after_passes):
        self.after, self.reserved, self.asked, self.passes = list(after_passes), 2000, 0, 0
        monkeypatch.setattr(dry_run, "allocator_retries", lambda: self.asked)
        monkeypatch.setattr(dry_run, "_optimizer_state", lambda model, work: ["state"])
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: self.reserved * MB)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(self):
        self.passes += 1
        held = self.after.pop(0)
        self.asked += held is None
        self.reserved = held or 3000


@pytest.mark.parametrize(
    ("after_passes", "passes", "asked_again", "grew"),
    [
        ([3000, 3000], 2, False, False),
        ([3000, 3020], 2, False, False),  # a little more, and far from the end
        ([5600, 5900, 6000, 6000], 4, False, False),
        ([None, 5600, 5900, 5900], 4, False, False),  # once, before it knew what to keep
        ([5600, 5900, None, 5900, None], 5, True, False),  # each step of a run at 24 GiB asked again
        ([2000, 3500, 4600, 5400, 5900], 5, False, True),
        ([5600, 6200], 2, False, False),  # beyond the budget, whatever comes then
    ],
)
def test_a_micro_batch_runs_until_the_allocator_rests(monkeypatch, after_passes, passes, asked_again, grew):
    gpu, tried, model = Gpu(monkeypatch, after_passes), dry_run._Passes(), torch.nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)
    tried.settle(gpu.run, model, WORK, BUDGET)
    assert (gpu.passes, tried.asked_again, tried.grew) == (passes, asked_again, grew)
    assert tried.state, "the optimizer's state lies between what passes leave"
    assert model.weight.grad is None  # as after a step


@pytest.mark.parametrize(
    ("asked_again", "grew", "solved", "tightest", "fits"),
    [
        (False, False, True, False, True),
        (True, False, False, True, False),
        (False, True, True, False, False),  # another policy may rest
        (False, True, False, False, True),  # set by hand, or a resumed run's: not to be changed for that
        (False, True, True, True, True),  # there is no other
    ],
)
def test_growth_is_no_misfit_where_nothing_else_can_be_had(monkeypatch, asked_again, grew, solved, tightest, fits):
    found = dry_run._Passes(asked_again=asked_again, grew=grew, ended=True)
    monkeypatch.setattr(dry_run.Trials, "_run_all", lambda _: found)
    for name in ("reset_peak_memory_stats", "max_memory_reserved", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: BUDGET)
    layers = TurnedLayers()
    layers.offload = SimpleNamespace(begin=lambda: None)
    layers.policy = MemoryPolicy.parse(TIGHTEST, 32) if tightest else MemoryPolicy(offloaded_layers=8)
    monkeypatch.setattr(dry_run, "keep_embeddings_on_host", lambda model: None)
    problem = Problem(COSTS, Room(MB), 2048, WORK) if solved else None
    attempt = dry_run.Trials(torch.nn.Linear(2, 2), layers, WORK, BUDGET).attempt(problem)
    assert attempt.fits is fits


def test_the_optimizers_state_stands_where_it_will_in_two_tensors_a_weight(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(30, 20, bias=False), torch.nn.Linear(20, 10, bias=False))
    model[0].weight.requires_grad_(False)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))
    state = dry_run._optimizer_state(model, SimpleNamespace(coming_bytes=200 * (4 + 8)))
    assert [(len(tensor), tensor.dtype) for tensor in state] == [(200 * 4, torch.uint8)] * 2


def test_objects_that_the_program_keeps_from_garbage_collection_stay_so():
    kept = gc.get_freeze_count()  # conftest's pytest_collection_finish
    assert kept
    with dry_run._gc_frozen():
        pass
    assert gc.get_freeze_count() == kept
