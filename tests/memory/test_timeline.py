"""The timeline against a second account of it: every byte, event by event."""

import pytest

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.memory.layer_costs import LayerCosts, Link, Split, offload_schedule, timeline_s
from planning_shapes import random_case

COSTS = LayerCosts(8, 100, 40, 10, 1.0, 2.0, 0.5, 1.1, loss_s=1.0)
FAST, SLOW = Link(1e9, 1e9), Link(20.0, 20.0, drag=0.0)
PLENTY = 10**9


def most_bytes(costs, policy, link, room):
    """Most bytes on the device at once, and when the last layer is done, from the schedule alone."""
    split = Split(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers)
    level = [split.level(layer) for layer in range(costs.layers)]
    first = offload_schedule(costs, policy, room).on_device_from
    now, out, left, events = 0.0, 0.0, [], []
    for layer in range(costs.layers):
        now = max([now, *left[: first[layer]]])
        events.append((now, costs.saved[level[layer]]))
        now += costs.forward_s
        if layer < policy.offloaded_layers:
            now += link.drag * costs.saved[level[layer]] / link.to_host_bytes_s
            out = max(out, now) + costs.saved[level[layer]] / link.to_host_bytes_s
            left.append(out)
            if layer < first[-1]:
                events.append((out, -costs.saved[level[layer]]))
    now = max([now, *left[: first[-1]]])
    events += [(now, costs.loss_bytes), (now + costs.loss_s, -costs.loss_bytes)]
    now += costs.loss_s
    home, back = now, {}
    for layer in reversed(range(costs.layers)):
        for asked in reversed(range(first[layer], policy.offloaded_layers)):
            if asked not in back and asked < first[-1]:
                start = max(home, now)
                events.append((start, costs.saved[level[asked]]))
                home = back[asked] = start + costs.saved[level[asked]] / link.to_device_bytes_s
        if layer in back:
            now = max(now, back[layer]) + link.drag * costs.saved[level[layer]] / link.to_device_bytes_s
        events.append((now, costs.working[level[layer]]))
        now += costs.backwards[level[layer]]
        events.append((now, -costs.working[level[layer]] - costs.saved[level[layer]]))
    here = most = 0
    for _, change in sorted(events):
        here += change
        most = max(most, here)
    return most, now


@pytest.mark.parametrize("seed", range(60))
def test_the_schedule_keeps_to_the_room_that_the_policy_was_counted_with(seed):
    costs, link, room = random_case(seed)
    for whole in range(costs.layers + 1):
        for feed_forward in range(costs.layers + 1 - whole):
            split = Split(costs, whole, whole + feed_forward)
            for offload in range(costs.layers + 1):
                needed = split.device_bytes(offload)
                policy = MemoryPolicy(feed_forward, whole, offload)
                most, end = most_bytes(costs, policy, link, max(room, needed))
                first = offload_schedule(costs, policy, max(room, needed)).on_device_from
                # where a lower layer has room for fewer, those that the layer above it asked for are there already
                assert most <= max(room, needed) or list(first) != sorted(first)
                assert end == pytest.approx(timeline_s(costs, policy, link, max(room, needed)))


def test_offload_is_free_below_the_link_s_rate():
    kept = timeline_s(COSTS, MemoryPolicy(), FAST, PLENTY)
    assert kept == 8 * 3.0 + 1.0
    assert timeline_s(COSTS, MemoryPolicy(offloaded_layers=8), FAST, PLENTY) == pytest.approx(kept, rel=1e-5)
    assert timeline_s(COSTS, MemoryPolicy(offloaded_layers=8), Link(100.0, 50.1, drag=0.0), 300) < kept + 2.1


def test_copies_slow_down_what_computes_beside_them():
    dragged = timeline_s(COSTS, MemoryPolicy(offloaded_layers=6), Link(200.0, 400.0, drag=0.1), 0)
    assert dragged == pytest.approx(25.0 + 0.1 * 6 * (100 / 200 + 100 / 400))


def test_a_slow_link_stalls_by_the_difference():
    """Six of eight layers travel, 5 s each way, and the first can leave and the last be called for only at work."""
    taken = timeline_s(COSTS, MemoryPolicy(offloaded_layers=8), SLOW, 200)
    assert taken == 1 + 6 * 5.0 + 1 + 1 + 2 + 6 * 5.0 + 2


def test_copies_need_not_wait_for_room_that_is_there():
    policy, room, link = MemoryPolicy(offloaded_layers=4), 500, Link(50.0, 50.0, drag=0.0)
    assert timeline_s(COSTS, policy, link, room) == 8 * 3.0 + 1.0


@pytest.mark.parametrize("seed", range(40))
def test_a_faster_link_is_never_slower(seed):
    costs, link, room = random_case(seed)
    for offload in range(costs.layers + 1):
        policy = MemoryPolicy(costs.layers // 3, costs.layers // 3, offload)
        slow = timeline_s(costs, policy, link, room)
        for faster in (Link(2 * link.to_host_bytes_s, link.to_device_bytes_s),
                       Link(link.to_host_bytes_s, 2 * link.to_device_bytes_s)):  # fmt: skip
            assert timeline_s(costs, policy, faster, room) <= slow + 1e-9
