import time
from dataclasses import replace

import pytest

from lorafit.config.memory_policy import MemoryPolicy
from lorafit.hardware.device import GIB
from lorafit.memory.layer_costs import Split, timeline_s
from lorafit.memory.solver import LayerCosts, Link, Room, micro_sizes, solve, solve_micro
from planning_shapes import random_case

TOKENS = 8192
WORKING = 4 * TOKENS * 14336 * 2 + 117_000_000
LLAMA_8B = LayerCosts(  # on one H200, 4 × 2,048 tokens
    32, 92 * 1024 * TOKENS, 36 * 1024 * TOKENS, 8 * 1024 * TOKENS, 0.0050, 0.0090, 0.0027, 0.0050,
    WORKING, WORKING + 56 * 1024 * TOKENS, WORKING + 84 * 1024 * TOKENS,
    fixed_working_bytes=117_000_000, fixed_s=0.0002, loss_bytes=256 << 20, fixed_loss_bytes=256 << 20, loss_s=0.025,
)  # fmt: skip
PCIE5 = Link(55e9, 55e9)


def every_policy(layers):
    return (
        MemoryPolicy(feed_forward, whole, offload)
        for whole in range(layers + 1)
        for feed_forward in range(layers + 1 - whole)
        for offload in range(layers + 1)
    )


def brute_force(costs, room):
    """The least seconds of all policies that fit, or None."""
    times = []
    for policy in every_policy(costs.layers):
        split = Split(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers)
        if (
            split.device_bytes(policy.offloaded_layers) <= room.device_bytes
            and split.saved_by(policy.offloaded_layers) <= room.host_bytes
        ):
            taken = timeline_s(costs, policy, room.link, room.device_bytes) if policy.offloaded_layers else split.work_s
            times.append(taken)
    return min(times, default=None)


@pytest.mark.parametrize("seed", range(150))
def test_nothing_is_faster_than_what_is_solved(seed):
    costs, link, device_bytes = random_case(seed)
    room = Room(device_bytes, link=link)
    found, best = solve(costs, room), brute_force(costs, room)
    assert (found is None) == (best is None)
    if found:
        assert found.step_s == pytest.approx(best, rel=1e-9)
        assert found.device_bytes <= device_bytes


@pytest.mark.parametrize("seed", range(40))
def test_host_memory_is_a_limit_too(seed):
    costs, link, device_bytes = random_case(seed)
    room = Room(device_bytes, host_bytes=costs.kept_bytes, link=link)
    found = solve(costs, room)
    assert found is None or found.host_bytes <= costs.kept_bytes
    assert found is None or found.step_s >= brute_force(costs, room) - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_more_room_or_a_faster_link_is_never_slower(seed):
    costs, link, device_bytes = random_case(seed)
    room = Room(device_bytes, link=link)
    last = float("inf")
    for larger in range(device_bytes, 4 * device_bytes, max(1, device_bytes // 5)):
        found = solve(costs, replace(room, device_bytes=larger))
        taken = found.step_s if found else float("inf")
        assert taken <= last + 1e-9
        last = taken
    slow = solve(costs, room)
    fast = solve(costs, replace(room, link=Link(2 * link.to_host_bytes_s, 2 * link.to_device_bytes_s)))
    assert slow is None or fast.step_s <= slow.step_s + 1e-9


def test_everything_stays_where_there_is_room_for_it():
    assert solve(LLAMA_8B, Room(40 * GIB, link=PCIE5, embedding_bytes=GIB)).policy == MemoryPolicy()
    assert solve_micro(LLAMA_8B, Room(40 * GIB, link=PCIE5), tokens=TOKENS, longest=512).policy == MemoryPolicy()


def test_without_a_link_layers_are_recomputed_and_none_leaves():
    found = solve(LLAMA_8B, Room(8 * GIB))
    assert found.policy.offloaded_layers == found.host_bytes == 0
    assert found.policy.recompute_layers > 0


def test_no_room_at_all_is_no_solution():
    assert solve(LLAMA_8B, Room(GIB, link=PCIE5)) is None
    assert solve(LLAMA_8B, Room(-GIB, link=PCIE5)) is None


def test_only_what_beats_the_bound_is_a_solution():
    room = Room(8 * GIB, link=PCIE5)
    best = solve(LLAMA_8B, room)
    assert solve(LLAMA_8B, room, best.step_s) is None
    assert solve(LLAMA_8B, room, best.step_s * 1.001) == best


def test_embeddings_move_only_when_that_pays():
    room = Room(3 * GIB, link=PCIE5, embedding_bytes=GIB, embedding_s=0.001)
    moved, stayed = solve(LLAMA_8B, room), solve(LLAMA_8B, replace(room, embedding_bytes=0))
    assert moved.policy.host_embeddings
    assert moved.step_s < stayed.step_s
    assert moved.device_bytes <= room.device_bytes
    assert moved.host_bytes <= GIB + Split(LLAMA_8B, 0, 0).saved_by(32)
    assert not solve(LLAMA_8B, replace(room, embedding_s=1.0)).policy.host_embeddings
    assert not solve(LLAMA_8B, replace(room, host_bytes=GIB - 1)).policy.host_embeddings


def test_a_slow_gpu_beside_a_fast_link_offloads_everything_for_nothing():
    """A GPU five times slower at 25 GB/s, as the design reckons."""
    slow = replace(
        LLAMA_8B, forward_s=0.025, backward_s=0.045, recompute_feed_forward_s=0.0135, recompute_layer_s=0.025
    )
    found = solve(slow, Room(5 * GIB, link=Link(25e9, 25e9)))
    kept = Split(slow, 0, 0).work_s
    assert found.step_s < 1.07 * kept
    assert found.policy.offloaded_layers >= 24


def test_micro_batches_shrink_when_that_is_cheaper_than_recomputing():
    room = Room(8 * GIB, link=PCIE5)
    whole, halved = solve(LLAMA_8B, room), solve_micro(LLAMA_8B, room, tokens=TOKENS, longest=512)
    assert halved.step_s < whole.step_s
    assert halved.policy.micro_tokens in (4096, 2048, 1024, 512)
    assert solve_micro(LLAMA_8B, room, tokens=TOKENS, longest=TOKENS).policy == whole.policy


def test_host_memory_is_pinned_only_for_a_gain_worth_it():
    def solved(gain):
        # two micro-batches pay one more unpacking: that is what keeping away from the host costs here
        costs = replace(LLAMA_8B, fixed_s=gain * LLAMA_8B.forward_s)
        return solve_micro(costs, Room(20 * GIB, link=replace(PCIE5, drag=0.0)), tokens=TOKENS, longest=512)

    assert solved(0.01).policy == MemoryPolicy(micro_tokens=4096)
    assert solved(0.10).host_bytes > 0


def test_a_step_of_more_tokens_takes_as_many_more_micro_batches():
    room = Room(8 * GIB, link=PCIE5)
    one, four = (solve_micro(LLAMA_8B, room, tokens=TOKENS, longest=512, step_tokens=n * TOKENS) for n in (1, 4))
    assert one.policy == four.policy
    assert four.step_s == pytest.approx(4 * one.step_s)


@pytest.mark.parametrize("longest", [1, 500, 2048, 8192, 9000])
def test_every_micro_batch_holds_the_longest_row(longest):
    sizes = list(micro_sizes(8192, longest))
    assert sizes[0] == 8192
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(size >= min(longest, 8192) for size in sizes)
    assert sizes[-1] == min(longest, 8192)


@pytest.mark.parametrize("room_gib", [2.5, 6, 24, 50])
def test_many_layers_are_solved_nearly_as_well_as_by_trying_every_split(room_gib, monkeypatch):
    costs, room = replace(LLAMA_8B, layers=80), Room(int(room_gib * GIB), link=PCIE5)
    found = solve(costs, room)
    monkeypatch.setattr("lorafit.memory.solver.FINE_LAYERS", 80)
    assert found.step_s == pytest.approx(solve(costs, room).step_s, rel=0.005)


@pytest.mark.parametrize("room_gib", [2.0, 2.5, 6, 24])
def test_a_hundred_layers_are_solved_at_once(room_gib):
    started = time.process_time()
    solve(replace(LLAMA_8B, layers=100), Room(int(room_gib * GIB), link=PCIE5))
    assert time.process_time() - started < 1.0  # 0.3 s on a core of one's own


@pytest.mark.parametrize(
    "start",
    [
        MemoryPolicy(),
        MemoryPolicy(recompute_mlp_layers=20, offloaded_layers=28),
        MemoryPolicy(recompute_layers=3),
        MemoryPolicy(offloaded_layers=30),
    ],
)
def test_a_tighter_policy_never_needs_more(start):
    def device_bytes(policy):
        costs = LLAMA_8B.scaled((policy.micro_tokens or TOKENS) / TOKENS)
        split = Split(costs, policy.recompute_layers, policy.recompute_layers + policy.recompute_mlp_layers)
        return split.device_bytes(policy.offloaded_layers) - (GIB if policy.host_embeddings else 0)

    policy = start
    while (tighter := policy.next_smaller(32, TOKENS, 700)) is not None:
        assert device_bytes(tighter) <= device_bytes(policy)
        policy = tighter
    assert device_bytes(policy) < device_bytes(start) / 3


def test_the_same_numbers_give_the_same_policy():
    room = Room(8 * GIB, link=PCIE5, embedding_bytes=GIB)
    assert solve_micro(LLAMA_8B, room, tokens=TOKENS, longest=512) == solve_micro(
        LLAMA_8B, room, tokens=TOKENS, longest=512
    )
