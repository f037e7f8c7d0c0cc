import pytest

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.training.guards.memory_retry import IN_A_ROW, AllocatorWatch
from lorafit.training.logging.run_logs import EventLog


class Layers:
    def __init__(self, steps_left):
        self.policy, self.steps_left = MemoryPolicy(), steps_left

    def reduce_slightly(self):
        self.steps_left -= 1
        return self.steps_left >= 0


def run(retries_of_steps, steps_left=9, between=0):
    """Events of a run whose steps make the allocator ask again so often; `between` of them outside of steps."""
    count, events = [0], EventLog()
    watch = AllocatorWatch(Layers(steps_left), events, retries=lambda: count[0])
    for step, retries in enumerate(retries_of_steps, 1):
        count[0] += between
        watch.begin_step()
        count[0] += retries
        watch.end_step(step)
    return [(event.kind, event.step) for event in events.seen]


def test_steps_in_a_row_that_wait_for_memory_turn_the_policy():
    assert run([1] * IN_A_ROW) == [("tight_memory", IN_A_ROW)]


def test_a_step_now_and_then_does_not():
    assert run(([1] * (IN_A_ROW - 1) + [0]) * 5) == []


def test_what_happens_between_steps_does_not_count():
    assert run([0] * 20, between=3) == []


def test_it_gives_the_new_setting_its_time_and_stops_at_the_tightest():
    assert run([1] * IN_A_ROW * 4, steps_left=2) == [("tight_memory", IN_A_ROW), ("tight_memory", 2 * IN_A_ROW)]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (MemoryPolicy(dequantized_layers=8), MemoryPolicy(dequantized_layers=4), "fewer weights stay dequantized now"),
        (MemoryPolicy(cuda_graph_max_tokens=64), MemoryPolicy(), "no CUDA graphs are recorded now"),
        (
            MemoryPolicy(offloaded_layers=8),
            MemoryPolicy(offloaded_layers=11),
            "11 layers are offloaded to the host now, instead of 8",
        ),
        (
            MemoryPolicy(offloaded_layers=8),
            MemoryPolicy(offloaded_layers=2, recompute_mlp_layers=9),
            "more is recomputed now",
        ),
        (
            MemoryPolicy(recompute_mlp_layers=6),
            MemoryPolicy(recompute_mlp_layers=5, offloaded_layers=9),
            "9 layers are offloaded to the host now, instead of 0",
        ),
        (
            MemoryPolicy(offloaded_layers=8),
            MemoryPolicy(offloaded_layers=8),
            "less stays on the GPU now",
        ),  # by a tighter schedule
    ],
)
def test_what_gave_way_is_said(before, after, said):
    layers, events, turned = Layers(1), EventLog(), []
    layers.policy, layers.reduce_slightly = before, lambda: setattr(layers, "policy", after) or True
    watch = AllocatorWatch(
        layers, events, retries=iter(range(99)).__next__, on_change=lambda: turned.append(layers.policy)
    )
    for step in range(1, IN_A_ROW + 1):
        watch.begin_step()
        watch.end_step(step)
    (event,) = events.seen
    assert event.message.endswith(said) and turned == [after]
