"""Which dials are rehearsed, one after another, and which one a run ends up with."""

import pytest

from lorafit.engine import rehearsal
from lorafit.engine.dial_problem import DialProblem, Work
from lorafit.planning.dial_solver import Room
from lorafit.planning.layer_costs import LayerCosts, Link
from turned_layers import TurnedLayers

MB = 1 << 20
COSTS = LayerCosts(
    layers=32, kept_bytes=184 * MB, feed_forward_bytes=72 * MB, whole_bytes=16 * MB, forward_s=0.005, backward_s=0.008,
    recompute_feed_forward_s=0.0027, recompute_layer_s=0.005, kept_working_bytes=400 * MB,
    feed_forward_working_bytes=512 * MB, whole_working_bytes=584 * MB, loss_bytes=304 * MB,
)  # fmt: skip
TIGHTEST = "whole=32,offload=32,embeddings=host,micro_tokens=2048"
WORK = Work(None, None, max_tokens=2048, longest=2048, step_tokens=2048.0, coming_bytes=80 * MB)
BUDGET = 6144 * MB


@pytest.fixture
def attempts(monkeypatch):
    """The attempts from a problem with so much room, on a card where whatever stands takes `standing` bytes."""

    def made(room_mb, standing_mb, needs_mb):
        def attempt(model, layers, work, budget, problem):
            peak = (standing_mb + needs_mb(layers.dial)) * MB
            fits = peak + work.coming_bytes <= budget
            return rehearsal.Attempt(str(layers.dial), problem.room.device_bytes, peak, peak, 0, (0, 0), 0.0, fits)

        monkeypatch.setattr(rehearsal, "_attempt", attempt)
        layers = TurnedLayers()
        problem = DialProblem(COSTS, Room(room_mb * MB, 64 << 30, Link(50e9, 50e9)), 2048, WORK)
        return list(rehearsal._attempts(None, layers, WORK, BUDGET, problem)), layers

    return made


def test_where_the_tightest_dial_leaves_room_a_faster_one_is_taken(attempts):
    tried, layers = attempts(500, 4800, lambda dial: 616 if dial.whole else 950)
    assert tried[0].dial == TIGHTEST and len(tried) == 2
    assert tried[-1].fits and not layers.dial.whole and layers.dial.offload and layers.schedule
    assert tried[-1].room_bytes == (616 + 6144 - 80 - 4800 - 616 - 48) * MB


def test_where_that_does_not_fit_after_all_it_is_the_tightest_again(attempts):
    tried, layers = attempts(500, 4800, lambda dial: 616 if dial.whole else 1500)
    assert [attempt.fits for attempt in tried] == [True, False, True]
    assert str(layers.dial) == tried[-1].dial == TIGHTEST and layers.schedule == ()


def test_after_a_misfit_that_led_to_the_tightest_dial_the_room_between_is_tried(attempts):
    tried, layers = attempts(900, 4800, lambda dial: 616 if dial.whole == 32 else dial.offload and 1290)
    assert not tried[0].fits and tried[1].dial == TIGHTEST and tried[1].fits
    assert tried[1].room_bytes < tried[2].room_bytes < tried[0].room_bytes
    assert str(layers.dial) == tried[-1].dial == TIGHTEST and tried[-1].fits
    fitting, layers = attempts(900, 4800, lambda dial: 1290 if str(dial) == tried[0].dial else 616)
    assert fitting[-1].fits and not layers.dial.whole and len(fitting) == 3


def test_where_it_leaves_none_nothing_else_is_tried(attempts):
    tried, layers = attempts(500, 5440, lambda dial: 616)
    assert [attempt.dial for attempt in tried] == [TIGHTEST] == [str(layers.dial)]


def test_a_dial_that_was_solved_is_not_solved_again_because_it_left_room(attempts):
    tried, layers = attempts(900, 3000, lambda dial: 900)
    assert len(tried) == 1 and tried[0].fits and not layers.dial.whole
