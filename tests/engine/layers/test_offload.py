"""Saved tensors that wait on the host while other layers run."""

import pytest
import torch

from lorafit.engine.layers import offload
from lorafit.engine.layers.offload import HostOffload, PinnedArena

LAYERS = 4


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    monkeypatch.setattr(offload, "CHUNK_BYTES", 4096)


def gradient(schedule=(), leaving=LAYERS, log=None):
    """The gradient of a chain of products, the first `leaving` of whose saved tensors leave."""
    host = HostOffload()
    host.schedule = schedule
    x = torch.linspace(-1, 1, 96, dtype=torch.float64).reshape(8, 12).requires_grad_()
    weights = [torch.full((12, 12), 0.1 * (place + 1), dtype=torch.float64) for place in range(LAYERS)]
    host.begin()
    h = x
    for place, weight in enumerate(weights):
        keep = frozenset({weight.untyped_storage().data_ptr()})
        with host.around(place, place < leaving, keep):
            h = torch.tanh(h @ weight).t().contiguous().t() * h
        if log is not None:
            log.append(
                {index for index, layer in host.offloaded.items() if any(one.source is not None for one in layer)}
            )
    host.end_forward(LAYERS)
    h.sum().backward()
    return x.grad, host


@pytest.mark.parametrize("leaving", [0, 1, 3, LAYERS])
@pytest.mark.parametrize("schedule", [(), (0, 0, 0, 0, 0), (0, 1, 2, 3, 4), (0, 0, 1, 1, 2)])
def test_the_gradient_is_the_same_to_the_bit_wherever_tensors_waited(leaving, schedule):
    wanted, _ = gradient(leaving=0)
    got, host = gradient(schedule, leaving)
    assert torch.equal(got, wanted)
    assert (host.sent_bytes > 0) == (leaving > 0)


def test_the_schedule_says_which_originals_stay_on_the_device():
    log = []
    gradient((0, 0, 1, 2, 3), log=log)
    assert log == [{0}, {0, 1}, {1, 2}, {2, 3}]


def test_without_a_schedule_two_layers_stay_at_a_time():
    log = []
    gradient(log=log)
    assert max(len(there) for there in log) == 2


def test_nothing_waits_after_the_backward():
    _, host = gradient()
    assert all(one.back is None and one.source is None for layer in host.offloaded.values() for one in layer)


def test_weights_never_leave():
    host = HostOffload()
    weight = torch.ones(12, 12, requires_grad=True)
    with host.around(0, True, frozenset({weight.untyped_storage().data_ptr()})):
        (torch.ones(8, 12, requires_grad=True) @ weight).sum()
    assert all(one.shape != weight.shape for one in host.offloaded[0])


def test_the_arena_hands_out_the_same_memory_again_after_a_restart():
    arena = PinnedArena()
    first = [arena.take(torch.empty(size)).data_ptr() for size in (100, 900, 5000)]
    arena.restart()
    assert [arena.take(torch.empty(size)).data_ptr() for size in (100, 900, 5000)] == first
    assert arena.reserved_bytes >= 4 * 6000


def test_the_arena_gives_back_what_the_last_micro_batch_did_not_need():
    arena = PinnedArena()
    arena.pin_ahead(5 * 4096)
    for sizes in ((4000, 4000, 4000), (4000, 100)):
        pieces = [arena.take(torch.empty(size, dtype=torch.uint8)) for size in sizes]
        arena.restart()
    arena.trim()
    assert arena.reserved_bytes == 2 * 4096
    again = [arena.take(torch.empty(size, dtype=torch.uint8)) for size in (4000, 100)]
    assert [piece.data_ptr() for piece in again] == [piece.data_ptr() for piece in pieces]
    arena.restart()
    arena.restart()  # a micro-batch that offloads nothing
    arena.trim()
    assert arena.reserved_bytes == 0


def test_a_tensor_larger_than_chunks_that_are_there_gets_one_of_its_own():
    arena = PinnedArena()
    arena.pin_ahead(2 * 4096)
    large = torch.arange(6000, dtype=torch.uint8)
    for _ in range(2):
        pieces = [arena.take(torch.empty(100, dtype=torch.uint8)), arena.take(large)]
        pieces[1].copy_(large)
        assert pieces[1].numel() == 6000
        arena.restart()


def test_pieces_of_the_arena_do_not_overlap():
    arena = PinnedArena()
    pieces = [arena.take(torch.empty(size, dtype=torch.float64)) for size in (7, 65, 300, 3)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    assert [set(piece.tolist()) for piece in pieces] == [{0.0}, {1.0}, {2.0}, {3.0}]


def test_what_is_pinned_ahead_is_what_is_handed_out():
    arena = PinnedArena()
    arena.pin_ahead(3 * 4096 + 100)
    pieces = [arena.take(torch.empty(3000, dtype=torch.uint8)) for _ in range(4)]
    assert arena.reserved_bytes == 4 * 4096
    assert len({piece.untyped_storage().data_ptr() for piece in pieces}) == 4
    arena.pin_ahead(4 * 4096)
    assert arena.ahead is None
