import pytest

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.planning.forecast import full_duration, full_memory, gpus_needed
from planning_shapes import TINY, facts, shape

H100 = hardware_named("H100")


@pytest.mark.parametrize(("card", "config"), [("H100", {}), ("RTX 4090", {}), ("H200", {"num_hidden_layers": 80})])
def test_the_cards_hold_weights_gradients_and_optimizer(card, config):
    device, model = hardware_named(card), shape(**config)
    cards = gpus_needed(model, device)
    assert cards * device.memory_bytes * 0.8 >= 16 * model.parameters > (cards - 1) * device.memory_bytes * 0.8
    assert full_memory(model, RunConfig(), device, facts()).fits(device)


def test_several_gpus_means_at_least_two():
    assert gpus_needed(shape(TINY), H100) == 2


def test_full_fine_tuning_costs_more_arithmetic_than_two_passes():
    taken = full_duration(shape(), RunConfig(), H100, facts(rows=200_000))
    flops = 8 * shape().active_parameters * taken.tokens
    assert taken.time_s[0] > flops / (gpus_needed(shape(), H100) * 989e12)
