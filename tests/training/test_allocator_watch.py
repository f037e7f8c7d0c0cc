from types import SimpleNamespace

from lorafit.config.dial import Dial
from lorafit.training.allocator_watch import IN_A_ROW, AllocatorWatch
from lorafit.training.events import EventLog


class Layers:
    def __init__(self, steps_left):
        self.dial, self.steps_left = Dial(), steps_left

    def relieve(self):
        self.steps_left -= 1
        return self.steps_left >= 0


def run(retries_of_steps, steps_left=9, between=0):
    """Events of a run whose steps make the allocator ask again so often; `between` of them outside of steps."""
    count, events = [0], EventLog()
    watch = AllocatorWatch(Layers(steps_left), events, retries=lambda: count[0])
    for step, retries in enumerate(retries_of_steps, 1):
        count[0] += between
        watch.on_step_begin(None, None, None)
        count[0] += retries
        watch.on_step_end(None, SimpleNamespace(global_step=step), None)
    return [(event.kind, event.step) for event in events.seen]


def test_steps_in_a_row_that_wait_for_memory_turn_the_dial():
    assert run([1] * IN_A_ROW) == [("tight_memory", IN_A_ROW)]


def test_a_step_now_and_then_does_not():
    assert run(([1] * (IN_A_ROW - 1) + [0]) * 5) == []


def test_what_happens_between_steps_does_not_count():
    assert run([0] * 20, between=3) == []


def test_it_gives_the_new_setting_its_time_and_stops_at_the_tightest():
    assert run([1] * IN_A_ROW * 4, steps_left=2) == [("tight_memory", IN_A_ROW), ("tight_memory", 2 * IN_A_ROW)]
