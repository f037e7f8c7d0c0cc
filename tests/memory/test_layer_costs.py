import pytest

from lorafit.memory.layer_costs import FEED_FORWARD, KEEP, WHOLE, LayerCosts, PeakMemory, Split

COSTS = LayerCosts(
    10, 100, 40, 10, 1.0, 2.0, 0.5, 1.1, 50, 60, 70, fixed_working_bytes=20, fixed_s=0.25, launch_s=0.5,
    loss_bytes=55, fixed_loss_bytes=15, loss_s=3.0,
)  # fmt: skip
SPLIT = Split(COSTS, whole=2, light=5)


def test_layers_are_recomputed_entirely_then_in_part_then_kept():
    assert [SPLIT.level(layer) for layer in (0, 1, 2, 4, 5, 9)] == [WHOLE] * 2 + [FEED_FORWARD] * 2 + [KEEP] * 2
    assert [SPLIT.saved_by(count) for count in (0, 2, 5, 6, 10)] == [0, 20, 140, 240, 640]


@pytest.mark.parametrize("size", range(0, 700, 7))
def test_the_fewest_layers_that_save_so_much(size):
    count = SPLIT.fewest(size)
    assert SPLIT.saved_by(count) >= min(size, 640)
    assert count == 0 or SPLIT.saved_by(count - 1) < size


def test_the_fullest_moment_is_at_the_loss_when_everything_is_kept():
    assert Split(COSTS, 0, 0).peak(0) == PeakMemory(1000, 0, 55)
    assert SPLIT.peak(0) == PeakMemory(640, 0, 55)


def test_what_is_recomputed_is_alive_when_most_of_the_rest_is_still_saved():
    assert Split(COSTS, 10, 10).peak(0) == PeakMemory(100, 0, 70)
    assert Split(COSTS, 0, 10).peak(0) == PeakMemory(400, 0, 60)


def test_an_offloaded_layer_is_there_while_it_works_and_while_it_travels():
    assert Split(COSTS, 0, 0).peak(10) == PeakMemory(0, 200, 55)
    assert Split(COSTS, 0, 0).peak(4) == PeakMemory(600, 0, 55)
    assert Split(COSTS, 0, 0).device_bytes(9) == 100 + 100 + 55  # the last layer and the one before it


def test_fewer_tokens_shrink_everything_but_a_weight_a_chunk_and_kernel_starts():
    half = COSTS.scaled(0.5)
    assert half.saved == (5, 20, 50)
    assert half.working == (45, 40, 35)
    assert (half.loss_bytes, half.loss_s) == (35, 1.5)
    assert half.forward_s == 0.25 + 0.375
    assert COSTS.scaled(0.01).forward_s == 0.5
    assert COSTS.scaled(0.01).recompute_feed_forward_s < 0.5
    assert COSTS.scaled(1.0) == COSTS
