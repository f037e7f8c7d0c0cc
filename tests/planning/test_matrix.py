import pytest

from lorafit.planning.matrix import DEFAULT_SERVING, MATRIX, SERVING, Case, choose, rank_limit


@pytest.mark.parametrize(
    ("rows", "goal", "fits_16bit", "method", "rank", "quantization"),
    [
        (0, "balanced", True, "QLoRA", 8, "nf4"),
        (4_999, "balanced", True, "QLoRA", 8, "nf4"),
        (4_999, "accuracy", True, "QLoRA", 8, "nf4"),
        (5_000, "balanced", True, "LoRA", 16, "none"),
        (5_000, "balanced", False, "QLoRA", 16, "nf4"),
        (50_000, "latency", True, "LoRA", 16, "none"),
        (50_000, "tenants", False, "QLoRA", 16, "nf4"),
        (50_001, "balanced", True, "LoRA", 32, "none"),
        (50_001, "balanced", False, "QLoRA", 32, "nf4"),
        (100_000, "accuracy", True, "LoRA", 32, "none"),
        (100_001, "accuracy", True, "full fine-tuning", 0, "none"),
        (100_001, "accuracy", False, "full fine-tuning", 0, "none"),
        (100_001, "balanced", True, "LoRA", 32, "none"),
        (20_000, "budget", True, "QLoRA", 8, "nf4"),
        (1_000_000, "budget", True, "QLoRA", 8, "nf4"),
    ],
)
def test_each_row_of_the_matrix(rows, goal, fits_16bit, method, rank, quantization):
    rule = choose(Case(rows, goal, fits_16bit))
    assert (rule.method, rule.rank, rule.quantization) == (method, rank, quantization)


def test_every_row_of_the_matrix_can_be_chosen():
    cases = [
        Case(rows, goal, fits)
        for rows in (100, 20_000, 80_000, 200_000)
        for goal in ("balanced", "budget", "accuracy")
        for fits in (True, False)
    ]
    assert {id(choose(case)) for case in cases} == {id(rule) for rule in MATRIX}


def test_every_row_says_when_and_why():
    assert len({rule.when for rule in MATRIX}) == len(MATRIX)
    assert all(rule.rank_reason and rule.base_reason for rule in MATRIX)


def test_serving_follows_the_goal():
    assert SERVING["latency"][0] == "merged"
    assert SERVING["tenants"][0] == "adapters"
    assert DEFAULT_SERVING[0] == "merged"


@pytest.mark.parametrize(("rows", "limit"), [(1, 8), (4_999, 8), (5_000, 16), (50_000, 16), (50_001, 32), (10**6, 32)])
def test_the_rank_that_so_many_rows_can_fill(rows, limit):
    assert rank_limit(rows) == limit
