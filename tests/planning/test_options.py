from lorafit.config import resolve
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB, Hardware
from lorafit.planning import make_plan
from lorafit.planning.matrix import MATRIX
from planning_shapes import TINY, facts, shape


def options(hardware, rows=20_000, config=None):
    return make_plan(resolve(), facts(rows=rows), shape(config) if config else shape(), hardware).options


def test_every_row_of_the_matrix_is_priced_and_one_is_chosen():
    priced = options(hardware_named("4090"))
    assert [(option.method, option.rank) for option in priced] == [(rule.method, rule.rank) for rule in MATRIX]
    assert sum(option.chosen for option in priced) == 1
    for option in priced:
        assert 0 < option.cost_usd[0] < option.cost_usd[1]
        assert 0 < option.time_s[0] < option.time_s[1]


def test_the_chosen_row_is_the_plan_itself():
    plan = make_plan(resolve(), facts(), shape(), hardware_named("4090"))
    [chosen] = [option for option in plan.options if option.chosen]
    assert (chosen.time_s, chosen.cost_usd) == (plan.time_s, plan.cost_usd)
    assert chosen.peak_bytes == plan.memory.needed_bytes <= plan.memory.peak_bytes


def test_what_unpacked_weights_take_of_a_large_card_is_nothing_that_a_method_needs():
    small, large = (
        make_plan(
            resolve(flags={"activations": policy, "quantization": "nf4"}), facts(), shape(), hardware_named("H200")
        )
        for policy in ("keep", "weights=dense")
    )
    assert large.memory.peak_bytes > small.memory.peak_bytes == large.memory.needed_bytes
    peaks = [next(option.peak_bytes for option in plan.options if option.chosen) for plan in (small, large)]
    assert peaks[0] == peaks[1]


def test_a_16_bit_base_needs_more_and_may_not_fit():
    priced = options(hardware_named("4090").with_memory(12 * GIB))
    by_method = {option.method: option for option in priced if option.rank == 16}
    assert not by_method["LoRA"].fits
    assert by_method["QLoRA"].fits


def test_full_fine_tuning_takes_several_cards_and_their_price():
    full = options(hardware_named("H100"))[0]
    assert full.gpus == 2  # 16 bytes × 8.03 B parameters in 80 % of 78 GiB each
    assert full.hardware == "H100"
    assert options(Hardware("a CPU", "cpu", 16 * GIB, cores=2), config=TINY)[0].hardware == "H100"
