"""The Triton kernel of AdamW with 8-bit moments, beside bitsandbytes' own in fp32."""

import os

import pytest
import torch
from bitsandbytes.optim import AdamW

from lorafit.methods.full import optimizer
from lorafit.methods.full.optimizer import with_stochastic_rounding

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "optim_bits": 8, "min_8bit_size": 256}
COUNT = 256 * 20 + 100
needs_kernel = pytest.mark.skipif(
    optimizer.kernel is None or not (ON_GPU or INTERPRETED), reason="needs Triton, and a GPU or TRITON_INTERPRET=1"
)


def copied(state):
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def gradients(steps, device):
    generator = torch.Generator().manual_seed(1)
    sizes = 10 ** (-6 * torch.rand(COUNT, generator=generator))
    return [(torch.randn(COUNT, generator=generator) * sizes).bfloat16().to(device) for _ in range(steps)]


def moments(state, gradient):
    """The moments after a step from `state` by `gradient`, and whether they have a sign."""
    one, two = (
        state[f"qmap{which}"][state[f"state{which}"].int()] * state[f"absmax{which}"].repeat_interleave(256)[:COUNT]
        for which in (1, 2)
    )
    gradient = gradient.float()
    return (0.9 * one + 0.1 * gradient, True), (0.999 * two + 0.001 * gradient**2, False)


def nearest(moment, table, is_signed):
    """The codes of the nearest values of `table`; a negative value never becomes zero."""
    blocks = torch.nn.functional.pad(moment, (0, -COUNT % 256)).view(-1, 256)
    parts = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[:COUNT]
    codes = (parts[:, None] - table).abs().argmin(1).int()
    return torch.where((parts < 0) & (table[codes] == 0), codes - 1, codes) if is_signed else codes


@needs_kernel
def test_moments_are_those_of_bitsandbytes_and_weights_round_to_them_on_average():
    device = "cuda" if ON_GPU else "cpu"
    start = torch.randn(COUNT, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    wide = torch.nn.Parameter(start.float())
    theirs = AdamW([wide], **OPTIONS)
    ours, state = start.clone(), None
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    for number, gradient in enumerate(gradients(3, device)):
        if state is None:
            theirs.init_state(theirs.param_groups[0], wide, 0, 0)
            state = copied(theirs.state[wide])
        before = copied(state)
        wide.data.copy_(ours)
        wide.grad = gradient.float()
        theirs.update_step(theirs.param_groups[0], wide, 0, 0)
        state["step"] += 1
        seed = torch.tensor([number], device=device)
        optimizer.kernel.adam_8bit(ours, gradient, state, settings=settings, seed=seed, first=0)
        for name in ("absmax1", "absmax2"):
            torch.testing.assert_close(state[name], theirs.state[wide][name], rtol=1e-5, atol=0)
        for code, (moment, is_signed) in zip(("state1", "state2"), moments(before, gradient), strict=True):
            apart = (state[code].int() - nearest(moment, state[code.replace("state", "qmap")], is_signed)).abs()
            assert apart.max() <= 1 and apart.count_nonzero() <= COUNT // 200, code  # ties
            theirs.state[wide][code].copy_(state[code])  # bitsandbytes' search on a CPU is not exact near zero
        unit = 2.0 ** (torch.frexp(wide.detach()).exponent - 8)
        error = (ours.float() - wide.detach()) / unit
        assert error.abs().max() < 1.01 and abs(error.mean()) < 0.03
        assert (ours != wide.detach().bfloat16()).count_nonzero() > COUNT // 10  # not to nearest


@needs_kernel
def test_a_weight_updated_in_parts_has_the_bits_of_one_updated_at_once():
    device = "cuda" if ON_GPU else "cpu"
    tensors = AdamW([torch.nn.Parameter(torch.ones(COUNT, device=device))], **OPTIONS)
    [gradient], [weight] = gradients(1, device), tensors.param_groups[0]["params"]
    tensors.init_state(tensors.param_groups[0], weight, 0, 0)
    settings = {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    made = []
    for size in (COUNT, 10 * optimizer.BLOCK):
        ours, state = torch.ones(COUNT, dtype=torch.bfloat16, device=device), copied(tensors.state[weight])
        state["step"] = 1
        for start in range(0, COUNT, size):
            part = slice(start, start + size)
            own, seed = optimizer._part_of(state, part, COUNT), torch.tensor([7], device=device)
            optimizer.kernel.adam_8bit(ours[part], gradient[part], own, settings=settings, seed=seed, first=start)
        made.append((ours, *(state[name] for name in sorted(optimizer.MOMENTS))))
    assert all(map(torch.equal, *made)) and optimizer.kernel.BLOCK == optimizer.BLOCK


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_the_optimizer_uses_the_kernel_and_the_seed_decides(monkeypatch):
    assert optimizer.kernel is not None

    def trained(seed):
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.zeros(COUNT, dtype=torch.bfloat16, device="cuda") + 1)
        ours = with_stochastic_rounding(AdamW)([weight], **OPTIONS)
        for gradient in gradients(4, "cuda"):
            weight.grad = gradient
            ours.step()
        return weight.detach(), ours.state[weight]

    (one, state), (again, _), (other, _) = trained(0), trained(0), trained(1)
    assert torch.equal(one, again) and not torch.equal(one, other) and state["step"] == 4
    monkeypatch.setattr(optimizer, "kernels_work", lambda device: False)
    plain, _ = trained(0)
    assert abs((one.float() - plain.float()).mean()) < 1e-4 and (one.float() - plain.float()).abs().max() < 0.05
