import pytest

from lorafit.config import RunConfig
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.memory import DataStats, PlanInputs
from lorafit.memory.execution_plan import plan_execution
from planning_shapes import LLAMA_1B, TINY, facts, shape

H200 = hardware_named("H200")
DENSE = DataStats(64, 64 * 2048, 64 * 2048, 2048, 2048.0)


def costs(model=None, hardware=H200, rows=DENSE, **settings):
    run = RunConfig(max_length=8192, examples_per_step=4, memory_policy="keep", dropout=0.0, **settings)
    return plan_execution(PlanInputs(run, rows, model or shape(), hardware)).costs


def test_a_feed_forward_costs_about_half_a_layer_to_make_again():
    """Gate and up are 54 % of an 8B layer's matmuls."""
    layer = costs()
    assert 0.4 < layer.recompute_feed_forward_s / layer.recompute_layer_s < 0.56
    assert layer.forward_s < layer.backward_s < 2.5 * layer.forward_s


def test_what_tokens_do_not_change_stays_when_there_are_fewer():
    layer = costs()
    assert 0 < layer.fixed_s < 0.1 * layer.forward_s
    assert layer.scaled(0.5).forward_s > layer.forward_s / 2


def test_four_bit_weights_are_unpacked_once_in_each_direction():
    """A layer of 218 M weights, 0.516 bytes read and 2 written each, at 70 % of 4.8 TB/s."""
    assert costs().fixed_s - costs(quantization="none").fixed_s == pytest.approx(218.1e6 * 2.516 / 3.36e12, rel=0.01)


def test_the_end_of_a_matmul_costs_the_same_however_many_its_tokens():
    assert 0 < costs(quantization="none").fixed_s == costs(quantization="none").scaled(0.1).fixed_s


@pytest.mark.parametrize(
    "slower",
    [{"targets": "all-linear"}, {"compute": "fp32"}, {"compile": "off"}, {"rank": 512, "targets": "all-linear"}],
)
def test_more_work_takes_longer(slower):
    assert costs(**slower).forward_s > costs().forward_s


def test_the_experts_of_a_layer_are_one_matmul_however_many():
    def tail(experts):
        sizes = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": 2}
        return costs(shape(**sizes), quantization="none").fixed_s

    assert 0 < tail(8) == pytest.approx(tail(64))


def test_longer_rows_take_longer_for_as_many_tokens():
    short = DataStats(64, 64 * 2048, 64 * 2048, 256, 256.0)
    assert costs(rows=short).backward_s < costs().backward_s


def test_a_small_layer_takes_what_starting_its_kernels_takes():
    tiny = costs(shape(TINY), rows=facts())
    assert tiny.forward_s == tiny.backward_s == tiny.launch_s > 0


def test_a_processor_is_counted_by_its_cores():
    two, four = (Hardware("a CPU", "cpu", 64 * GIB, cores=cores) for cores in (2, 4))
    assert costs(shape(LLAMA_1B), two).forward_s == pytest.approx(2 * costs(shape(LLAMA_1B), four).forward_s)
    assert costs(shape(LLAMA_1B), two).fixed_s == costs(shape(LLAMA_1B), two).launch_s == 0
