"""The gate: after an update that was withheld, everything is bit for bit as if there had been no step."""

import copy

import pytest
import torch

from lorafit.training.transformers_parts import withhold_unless_finite

BAD = [(float("nan"), 1.0), (1.0, float("nan")), (float("inf"), 1.0), (1.0, float("-inf"))]


def adamw(weights, **options):
    return torch.optim.AdamW(weights, lr=0.1, weight_decay=0.1, **options)


def eight_bit(weights, **unused):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(weights, lr=0.1, weight_decay=0.1)


OPTIMIZERS = {
    "fused": lambda weights: adamw(weights, fused=True),
    "foreach": lambda weights: adamw(weights, foreach=True),
    "one by one": lambda weights: adamw(weights, foreach=False),
    "8-bit": eight_bit,
}


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((64, 80), (7,))]


def give_gradients(parameters, seed, value=None):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) if value is None else None
        if value is not None:
            parameter.grad = torch.full_like(parameter, value)


def step(optimizer, parameters, seed, loss=1.0, norm=1.0, value=None):
    give_gradients(parameters, seed, value)
    withhold_unless_finite(optimizer, torch.tensor([loss, norm]))
    optimizer.step()
    optimizer.zero_grad()


def whole_state(optimizer, parameters):
    return copy.deepcopy([[parameter.data for parameter in parameters], optimizer.state_dict()["state"]])


def same(one, two):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_weights_moments_and_step_counts_stay_as_they_were(kind, loss, norm):
    parameters = weights()
    optimizer = OPTIMIZERS[kind](parameters)
    step(optimizer, parameters, 1)
    before = whole_state(optimizer, parameters)
    step(optimizer, parameters, 2, loss, norm, value=float("nan"))
    assert same(before, whole_state(optimizer, parameters))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_steps_after_it_are_those_of_a_run_that_never_had_it(kind):
    first, second = weights(), weights()
    disturbed, undisturbed = OPTIMIZERS[kind](first), OPTIMIZERS[kind](second)
    for seed in (1, 2, 3):
        step(disturbed, first, seed)
        step(disturbed, first, 10 + seed, float("nan"), float("nan"), value=float("inf"))
        step(undisturbed, second, seed)
    assert same(whole_state(disturbed, first), whole_state(undisturbed, second))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_finite_step_is_that_of_the_optimizer_alone(kind):
    first, second = weights(), weights()
    gated, plain = OPTIMIZERS[kind](first), OPTIMIZERS[kind](second)
    for seed in (1, 2, 3):
        step(gated, first, seed)
        give_gradients(second, seed)
        plain.step()
    assert same(whole_state(gated, first), whole_state(plain, second))


def test_a_first_step_that_is_bad_leaves_fresh_moments():
    parameters = weights()
    optimizer = OPTIMIZERS["fused"](parameters)
    step(optimizer, parameters, 1, float("nan"), float("nan"), value=float("nan"))
    assert same([weight.data for weight in weights()], [weight.data for weight in parameters])
    for state in optimizer.state.values():
        assert float(state["step"]) == 0
        assert not bool(state["exp_avg"].any())
        assert not bool(state["exp_avg_sq"].any())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["fused", "8-bit"])
def test_on_a_gpu_the_verdict_never_comes_to_the_host_before_the_fused_update(kind):
    parameters = [torch.nn.Parameter(weight.detach().cuda()) for weight in weights()]
    optimizer = OPTIMIZERS[kind](parameters)

    def take(seed, bad):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).cuda()
        measured = torch.stack([sum(parameter.grad.sum() for parameter in parameters), torch.ones((), device="cuda")])
        measured = measured * (float("nan") if bad else 1.0)
        torch.cuda.set_sync_debug_mode("error" if kind == "fused" else "default")
        try:
            withhold_unless_finite(optimizer, measured)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.zero_grad()

    take(1, bad=False)
    before = whole_state(optimizer, parameters)
    take(2, bad=True)
    assert same(before, whole_state(optimizer, parameters))
    take(3, bad=False)
    assert not same(before, whole_state(optimizer, parameters))
