from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.memory import estimate_memory
from lorafit.planning.forecast import forecast
from planning_shapes import facts, shape

H100 = hardware_named("H100")


def test_adapters_are_forecast_for_the_device_given():
    run = forecast(shape(), RunConfig(), H100, facts())
    assert (run.hardware, run.gpus) == (H100, 1)
    assert run.memory == estimate_memory(shape(), RunConfig(), H100, facts())
    assert run.cost_usd == run.duration.cost_usd(H100)


def test_a_full_run_is_priced_for_all_its_cards():
    run = forecast(shape(), RunConfig(), H100, facts(), full=True)
    assert run.gpus > 1
    assert run.cost_usd == run.duration.cost_usd(H100, run.gpus)
