"""16-bit weights take updates that are smaller than their precision."""

import pytest
import torch
from bitsandbytes.optim import AdamW8bit

from lorafit.methods.full import MasterWeights, stochastically_rounded, with_stochastic_rounding
from lorafit.methods.full import optimizer as module
from lorafit.training.checkpoints.snapshot import optimizer_state, restore_optimizer

OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}


def weights(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(64, 80), (80,), (40, 32)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)) for shape in shapes]


def groups(parameters):
    return [
        {"params": [one for one in parameters if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in parameters if one.ndim == 1], "weight_decay": 0.0},
    ]


def step(optimizer, parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for one in parameters:
        one.grad = torch.randn(one.shape, generator=generator).bfloat16().to(one.dtype)
    optimizer.step()
    for one in parameters:
        one.grad = None


@pytest.fixture(params=[module.PART_ELEMENTS, 1])
def in_parts(request, monkeypatch):
    monkeypatch.setattr(module, "PART_ELEMENTS", request.param)


def test_master_copies_are_the_weights_of_a_run_in_fp32(in_parts):
    wide, narrow = weights(torch.float32), weights(torch.bfloat16)
    reference, ours = (
        torch.optim.AdamW(groups(wide), **OPTIONS),
        MasterWeights(torch.optim.AdamW, groups(narrow), OPTIONS),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda number: 1 / (number + 1))
    for number in range(6):
        step(ours, narrow, number)
        for group in reference.param_groups:
            group["lr"] = OPTIONS["lr"] / (number + 1)
        step(reference, wide, number)
        schedule.step()
    for one, other in zip(wide, narrow, strict=True):
        assert torch.equal(ours.masters[other], one)
        assert torch.equal(other, one.bfloat16())


def test_a_step_that_is_withheld_changes_nothing():
    narrow = weights(torch.bfloat16)
    ours = MasterWeights(torch.optim.AdamW, groups(narrow), OPTIONS)
    step(ours, narrow, 0)
    before = {name: one.clone() for name, one in optimizer_state(ours)[0].items()}
    ours.found_inf = torch.ones(())
    step(ours, narrow, 1)
    after = optimizer_state(ours)[0]
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def made(kind, parameters):
    if kind == "master":
        return MasterWeights(torch.optim.AdamW, groups(parameters), OPTIONS)
    return with_stochastic_rounding(AdamW8bit)(groups(parameters), lr=1e-3)


@pytest.mark.parametrize("kind", ["master", "8bit"])
def test_a_restored_optimizer_goes_on_to_the_same_bits(kind):
    torch.manual_seed(3)
    one = weights(torch.bfloat16)
    whole = made(kind, one)
    for number in range(3):
        step(whole, one, number)
    saved, rest, chance = *optimizer_state(whole), torch.get_rng_state()
    two = [torch.nn.Parameter(each.detach().clone()) for each in one]
    again = made(kind, two)
    restore_optimizer(again, saved, rest)
    for number in range(3, 6):
        step(whole, one, number)
    torch.set_rng_state(chance)
    for number in range(3, 6):
        step(again, two, number)
    assert all(torch.equal(first, second) for first, second in zip(one, two, strict=True))
    assert all(torch.equal(each, optimizer_state(again)[0][name]) for name, each in optimizer_state(whole)[0].items())


def test_rounding_by_chance_is_right_on_average_and_exact_where_bf16_is():
    torch.manual_seed(0)
    wide = torch.full((200_000,), 1 + 1 / 1024)  # an eighth of the way from 1 to the next bf16
    rounded = stochastically_rounded(wide).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert abs(float(rounded.mean()) - (1 + 1 / 1024)) < 5e-5
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), float("-inf"), 3.3895e38]).bfloat16()
    assert torch.equal(stochastically_rounded(exact.float()), exact)
    assert stochastically_rounded(torch.tensor([float("nan")])).isnan().all()


def test_updates_below_the_precision_of_bf16_are_not_lost():
    """100 updates of a thousandth of the weight: rounded to the nearest, each would be lost."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    optimizer = with_stochastic_rounding(AdamW8bit)([weight], lr=1e-3, weight_decay=0.0)
    plain_weight = torch.nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    plain = AdamW8bit([plain_weight], lr=1e-3, weight_decay=0.0)
    for _ in range(100):
        for one, each in ((weight, optimizer), (plain_weight, plain)):
            one.grad = torch.ones_like(one)
            each.step()
    assert weight.dtype is torch.bfloat16
    assert abs(float(weight.detach().float().mean()) - 0.9) < 2e-3
    assert torch.equal(plain_weight, torch.ones_like(plain_weight))
