"""Prefetched: the same items in the same order, errors where they were due, and no thread left behind."""

import threading
import time

import pytest
import torch

from lorafit.engine import collate
from lorafit.training.batches import AHEAD, Prefetched, pinned

CPU = torch.device("cpu")


def test_the_items_come_in_order_and_then_end():
    ahead = Prefetched(iter(range(100)), CPU)
    assert list(ahead) == list(range(100))
    assert next(ahead, None) is None


def test_an_error_is_raised_where_the_item_was_due():
    def source():
        yield 1
        raise ValueError("the third row is odd")

    ahead = Prefetched(source(), CPU)
    assert next(ahead) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="the third row is odd"):
            next(ahead)


def test_it_makes_only_a_few_items_ahead():
    made = []

    def source():
        for item in range(50):
            made.append(item)
            yield item

    ahead = Prefetched(source(), CPU)
    assert next(ahead) == 0
    time.sleep(0.2)
    assert len(made) <= AHEAD + 2
    ahead.close()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_ends_the_thread(taken):
    before = threading.active_count()
    ahead = Prefetched(iter(range(1_000_000)), CPU)
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert not ahead.thread.is_alive()
    assert threading.active_count() == before


def test_it_works_while_the_caller_does():
    """Ten items that take 20 ms each to make and 20 ms each to use take far less than 400 ms."""

    def source():
        for item in range(10):
            time.sleep(0.02)
            yield item

    began = time.perf_counter()
    for _ in Prefetched(source(), CPU):
        time.sleep(0.02)
    assert time.perf_counter() - began < 0.34


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_tensor_of_a_micro_batch_is_pinned_and_unchanged():
    import numpy as np

    batch = collate([(np.arange(9), np.ones(9, bool)), (np.arange(4), np.ones(4, bool))])
    held = pinned(batch)
    for tensor in (held.ids, held.positions, held.predictors, held.targets, held.segments.cu_seqlens):
        assert tensor.is_pinned()
    assert torch.equal(held.ids, batch.ids)
    assert torch.equal(held.segments.cu_seqlens, batch.segments.cu_seqlens)
