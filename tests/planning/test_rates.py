import pytest

from lorafit.config import RunConfig
from lorafit.planning import DataFacts, hardware_named
from lorafit.planning.execution_plan import plan_execution
from lorafit.planning.hardware import GIB, Hardware
from planning_shapes import LLAMA_1B, TINY, facts, shape

H200 = hardware_named("H200")
DENSE = DataFacts(64, 64 * 2048, 64 * 2048, 2048, 2048.0)


def costs(model=None, hardware=H200, rows=DENSE, **settings):
    run = RunConfig(max_tokens=8192, examples_per_step=4, activations="keep", dropout=0.0, **settings)
    return plan_execution(model or shape(), run, hardware, rows).costs


@pytest.mark.parametrize(("dial", "measured"), [("keep", 17_375), ("recompute", 11_798)])
def test_the_probe_s_speed_comes_out(dial, measured):
    """Llama-3.1-8B shape, NF4, r = 16 on q and v, 4 × 2,048 tokens a step, compiled layers: tokens/s on an H200."""
    run = RunConfig(max_tokens=8192, examples_per_step=4, activations=dial, dropout=0.0)
    assert plan_execution(shape(), run, H200, DENSE).tokens_per_s == pytest.approx(measured, rel=0.05)


def test_fp8_comes_near_what_the_probe_saw_with_cached_weights():
    run = RunConfig(max_tokens=8192, examples_per_step=4, activations="keep", dropout=0.0, compute="fp8")
    assert plan_execution(shape(), run, H200, DENSE).tokens_per_s == pytest.approx(24_875, rel=0.08)


def test_a_feed_forward_costs_about_half_a_layer_to_make_again():
    """Gate and up are 54 % of an 8B layer's matmuls."""
    layer = costs()
    assert 0.4 < layer.recompute_feed_forward_s / layer.recompute_layer_s < 0.56
    assert layer.forward_s < layer.backward_s < 2.5 * layer.forward_s


def test_what_tokens_do_not_change_stays_when_there_are_fewer():
    layer = costs()
    assert 0 < layer.fixed_s < 0.05 * layer.forward_s
    assert layer.scaled(0.5).forward_s > layer.forward_s / 2
    assert costs(quantization="none").fixed_s == 0


@pytest.mark.parametrize(
    "slower",
    [{"targets": "all-linear"}, {"compute": "fp32"}, {"compile": "off"}, {"rank": 512, "targets": "all-linear"}],
)
def test_more_work_takes_longer(slower):
    assert costs(**slower).forward_s > costs().forward_s


def test_longer_rows_take_longer_for_as_many_tokens():
    short = DataFacts(64, 64 * 2048, 64 * 2048, 256, 256.0)
    assert costs(rows=short).backward_s < costs().backward_s


def test_a_small_layer_takes_what_starting_its_kernels_takes():
    tiny = costs(shape(TINY), rows=facts())
    assert tiny.forward_s == tiny.backward_s == tiny.launch_s > 0


def test_a_processor_is_counted_by_its_cores():
    two, four = (Hardware("a CPU", "cpu", 64 * GIB, cores=cores) for cores in (2, 4))
    assert costs(shape(LLAMA_1B), two).forward_s == pytest.approx(2 * costs(shape(LLAMA_1B), four).forward_s)
    assert costs(shape(LLAMA_1B), two).fixed_s == costs(shape(LLAMA_1B), two).launch_s == 0
