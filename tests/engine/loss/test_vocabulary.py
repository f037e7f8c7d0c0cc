"""The chunked loss against cross entropy over whole logits."""

import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import lorafit.engine.loss.vocabulary as vocabulary_loss
from lorafit.engine.loss.kernel import HAS_TRITON, losses_to_gradient
from lorafit.engine.loss.logit_rules import LogitSteps
from lorafit.engine.loss.vocabulary import (
    CHUNK_BYTES,
    IGNORED,
    apply_steps,
    chunked_loss,
    losses_and_gradient_in_torch,
    rows_per_chunk,
)

VOCABULARY, HIDDEN = 211, 24
STEPS = {
    "plain": LogitSteps(),
    "cap": LogitSteps(cap=3.0),
    "scale": LogitSteps(scale=0.4),
    "both": LogitSteps(scale=1.7, cap=5.0),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def some(rows, dtype=torch.float32, seed=0, width=2.0):
    """Hidden rows, targets, and a frozen head whose logits spread by `width`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    head.weight.data = (torch.randn(VOCABULARY, HIDDEN, generator=generator) * width / HIDDEN**0.5).to(dtype)
    return hidden, targets, head.requires_grad_(False)


def whole_loss(hidden, targets, head, steps):
    """The definition: every logit at once, in float64."""
    logits = head(hidden).double() * steps.scale
    if steps.cap is not None:
        logits = steps.cap * torch.tanh(logits / steps.cap)
    return cross_entropy(logits, targets, reduction="sum")


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def distance(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31])
def test_loss_and_gradient_are_those_of_whole_logits(rows, steps):
    """Rows below, at, just over and well over a chunk's eight."""
    hidden, targets, head = some(rows)
    chunked = chunked_loss(hidden, targets, head, steps, chunk_rows=8)
    whole = whole_loss(hidden, targets, head, steps)
    assert chunked.dtype == torch.float32
    assert distance(chunked.detach(), whole.detach()) < 1e-6
    assert distance(*gradients(chunked, hidden), *gradients(whole, hidden)) < 1e-6


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_a_trained_head_has_the_gradient_of_whole_logits(steps):
    hidden, targets, head = some(29)
    head.requires_grad_(True)
    got = gradients(chunked_loss(hidden, targets, head, steps, 8), hidden, head.weight)
    wanted = gradients(whole_loss(hidden, targets, head, steps), hidden, head.weight)
    assert all(distance(a, b) < 1e-6 for a, b in zip(got, wanted, strict=True))


def test_a_trained_head_in_bf16_has_its_gradient_summed_in_fp32():
    """64 chunks of two rows: summed in bf16, the total would lose more than one chunk's rounding."""
    hidden, targets, head = some(128, torch.bfloat16)
    head.requires_grad_(True)
    (few,) = gradients(chunked_loss(hidden, targets, head, STEPS["plain"], 2), head.weight)
    (one,) = gradients(chunked_loss(hidden, targets, head, STEPS["plain"], 128), head.weight)
    assert few.dtype == torch.bfloat16
    assert distance(few, one) < 4e-3


class LoraHead(nn.Module):
    """W x + B A x, adapters in fp32 over a frozen head, with an adapter beside it that is switched off."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen
        self.a, self.b = nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, VOCABULARY, bias=False)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x):
        base = self.frozen(x)
        return base + self.b(self.a(x.float())).to(base.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_adapted_head_has_the_gradient_of_whole_logits(dtype):
    torch.manual_seed(0)
    hidden, targets, frozen = some(29, dtype)
    head = LoraHead(frozen)
    leaves = (hidden, head.a.weight, head.b.weight)
    got = gradients(chunked_loss(hidden, targets, head, STEPS["cap"], 8), *leaves)
    wanted = gradients(whole_loss(hidden, targets, head, STEPS["cap"]), *leaves)
    limit = 1e-6 if dtype is torch.float32 else 8e-3
    assert all(distance(a, b) < limit for a, b in zip(got, wanted, strict=True))
    chunked_loss(hidden, targets, head, STEPS["cap"], 8).backward()
    assert float(head.idle.grad.abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_loses_only_the_rounding_of_the_logits(dtype):
    """Whole logits in the same precision are the reference."""
    hidden, targets, head = some(40, dtype)
    for steps in STEPS.values():
        chunked, whole = chunked_loss(hidden, targets, head, steps, 16), whole_loss(hidden, targets, head, steps)
        assert distance(chunked.detach(), whole.detach()) < 1e-5
        assert distance(*gradients(chunked, hidden), *gradients(whole, hidden)) < 8e-3


def test_autocast_reaches_the_head():
    """A head in fp32 that trains, hidden rows in fp32, logits in bf16: as in whole logits under autocast."""
    hidden, targets, head = some(29)
    head.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chunked = chunked_loss(hidden, targets, head, STEPS["plain"], 8)
        logits = head(hidden)
    assert logits.dtype == torch.bfloat16
    wanted = gradients(cross_entropy(logits.float(), targets, reduction="sum"), hidden, head.weight)
    got = gradients(chunked, hidden, head.weight)
    assert [gradient.dtype for gradient in got] == [torch.float32] * 2
    assert all(distance(a, b) < 8e-3 for a, b in zip(got, wanted, strict=True))


def test_the_incoming_gradient_scales_everything():
    hidden, targets, head = some(9)
    head.requires_grad_(True)
    plain = gradients(chunked_loss(hidden, targets, head, STEPS["cap"], 4), hidden, head.weight)
    scaled = gradients(chunked_loss(hidden, targets, head, STEPS["cap"], 4) / 8, hidden, head.weight)
    assert all(torch.equal(a / 8, b) for a, b in zip(plain, scaled, strict=True))


@pytest.mark.parametrize("share", [1 / 37, 0.013, 3.0])
def test_a_share_of_the_loss_costs_the_gradient_no_rounding_of_its_own(share):
    hidden, targets, head = some(200, torch.bfloat16)
    whole = cross_entropy(head(hidden).float(), targets, reduction="sum") * share
    (wanted,) = gradients(whole, hidden)
    shared = chunked_loss(hidden, targets, head, STEPS["plain"], 48, share=share)
    (afterwards,) = gradients(chunked_loss(hidden, targets, head, STEPS["plain"], 48) * share, hidden)
    assert distance(shared.detach(), whole.detach()) < 1e-6
    assert distance(*gradients(shared, hidden), wanted) < 3e-4 < 1e-3 < distance(afterwards, wanted)


def test_a_share_reaches_a_trained_head_and_capped_logits():
    hidden, targets, head = some(29)
    head.requires_grad_(True)
    got = gradients(chunked_loss(hidden, targets, head, STEPS["both"], 8, share=0.013), hidden, head.weight)
    wanted = gradients(whole_loss(hidden, targets, head, STEPS["both"]) * 0.013, hidden, head.weight)
    assert all(distance(a, b) < 1e-6 for a, b in zip(got, wanted, strict=True))


def test_in_fp16_a_small_share_loses_no_unlikely_token():
    """The scale of the loss, which fp16 needs, arrives with the backward pass: the share must wait for it."""
    hidden, targets, head = some(40, torch.float16)
    loss = chunked_loss(hidden, targets, head, STEPS["plain"], 16, share=1e-6) * 2.0**20
    (wanted,) = gradients(whole_loss(hidden, targets, head, STEPS["plain"]) * 1e-6 * 2.0**20, hidden)
    assert distance(*gradients(loss, hidden), wanted) < 1e-3


def test_no_supervised_row_costs_nothing_and_keeps_the_graph():
    hidden, targets, head = some(0)
    head.requires_grad_(True)
    loss = chunked_loss(hidden, targets, head, STEPS["plain"], 8)
    assert float(loss.detach()) == 0.0
    to_hidden, to_head = gradients(loss, hidden, head.weight)
    assert to_hidden.shape == hidden.shape
    assert float(to_head.abs().sum()) == 0.0


def test_extreme_logits_stay_finite():
    """exp overflows at 89 in fp32; the loss of a row that is certain is nought, and of one that errs the gap."""
    head = nn.Linear(2, 2, bias=False).requires_grad_(False)
    head.weight.data = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    hidden = torch.ones(2, 2, requires_grad=True)
    loss = chunked_loss(hidden, torch.tensor([0, 1]), head, STEPS["plain"], 8)
    assert float(loss.detach()) == 2e4
    assert torch.isfinite(*gradients(loss, hidden)).all()


def test_a_logit_that_is_not_a_number_shows_in_the_loss():
    hidden, targets, head = some(9)
    with torch.no_grad():
        hidden[4, 0] = float("nan")
    assert chunked_loss(hidden, targets, head, STEPS["plain"], 4).isnan()


class Largest(TorchDispatchMode):
    """The most elements that any new tensor had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_nothing_larger_than_a_chunks_logits_is_ever_made(steps, train):
    hidden, targets, head = some(1000)
    with torch.set_grad_enabled(train), Largest() as seen:
        loss = chunked_loss(hidden, targets, head, steps, 160)
        if train:
            loss.backward()
    assert seen.elements == 160 * VOCABULARY > hidden.numel()


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
def test_rows_whose_target_is_ignored_have_neither_loss_nor_gradient(steps):
    hidden, targets, head = some(31)
    counts = torch.arange(31) % 3 > 0
    loss = chunked_loss(hidden, targets.where(counts, IGNORED), head, steps, 8)
    wanted = whole_loss(hidden[counts], targets[counts], head, steps)
    assert abs(float(loss.detach() / wanted.detach()) - 1) < 1e-6
    (got,), (want,) = gradients(loss, hidden), gradients(wanted, hidden)
    assert distance(got, want) < 1e-5 and not got[~counts].any()


@pytest.mark.parametrize("share", [1.0, 1 / 3, 1 / 4096, 0.75, 1 / 65_537])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_share_in_a_tensor_is_the_share_as_a_number(share, dtype):
    hidden, targets, head = some(20, dtype)
    number, tensor = (chunked_loss(hidden, targets, head, STEPS["both"], 8, s) for s in (share, torch.tensor(share)))
    assert torch.equal(number, tensor)
    (got,), (want,) = gradients(tensor, hidden), gradients(number, hidden)
    assert distance(got, want) < (1e-6 if dtype is torch.float32 else 1e-3)


def test_evaluation_makes_no_gradient_even_of_a_head_that_trains(monkeypatch):
    hidden, targets, head = some(20)
    head.requires_grad_(True)
    whole = float(whole_loss(hidden, targets, head, STEPS["plain"]).detach())
    monkeypatch.setattr(torch.autograd, "grad", None)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            loss = chunked_loss(hidden, targets, head, STEPS["plain"], 8)
        assert not loss.requires_grad
        assert abs(float(loss) / whole - 1) < 1e-6


def test_chunks_are_by_default_what_their_bytes_allow(monkeypatch):
    """The head itself tells how wide its logits are, and how many bytes each takes."""
    hidden, targets, frozen = some(100, torch.bfloat16)
    head, seen = LoraHead(frozen), []
    frozen.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    monkeypatch.setattr(vocabulary_loss, "CHUNK_BYTES", 48 * VOCABULARY * 2)
    chunked_loss(hidden, targets, head, STEPS["plain"]).backward()
    assert seen == [0, 48, 48, 4]


def test_chunks_of_real_vocabularies_fit_their_bytes():
    for vocabulary in (32_000, 128_256, 151_936, 262_144):
        for itemsize in (2, 4):
            rows = rows_per_chunk(vocabulary, itemsize)
            assert rows % 16 == 0
            assert CHUNK_BYTES / 1.2 < rows * vocabulary * itemsize <= CHUNK_BYTES
    assert rows_per_chunk(10**7, 4) == 6
    assert rows_per_chunk(10**9, 4) == 1


def kernel_matches(logits, targets, steps, limit, weight=1.37):
    wanted_losses, wanted = losses_and_gradient_in_torch(logits.clone(), targets, steps, weight)
    got = logits.clone()
    losses = losses_to_gradient(got, targets, steps, weight)
    assert losses.dtype == torch.float32 and got.dtype == logits.dtype
    assert distance(losses, wanted_losses) < 1e-6
    assert distance(got, wanted) < limit


@pytest.mark.skipif(not HAS_TRITON or not INTERPRETED, reason="needs triton, and TRITON_INTERPRET=1")
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_interpreted_is_the_torch_code(steps, dtype, monkeypatch):
    monkeypatch.setattr("lorafit.engine.loss.kernel.BLOCK", 64)
    logits = (torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    targets = torch.tensor([0, VOCABULARY - 1, 63, 64, IGNORED, 100])
    # the interpreter cuts bf16 off where a GPU rounds
    kernel_matches(logits, targets, steps, 1e-6 if dtype is torch.float32 else 8e-3)


@pytest.mark.skipif(not HAS_TRITON or not INTERPRETED, reason="needs triton, and TRITON_INTERPRET=1")
def test_the_kernel_makes_a_wrong_target_and_a_bad_logit_visible():
    logits = torch.zeros(3, 8)
    logits[1, 2] = float("nan")
    losses = losses_to_gradient(logits, torch.tensor([8, 0, 1]), LogitSteps())
    assert not torch.isfinite(losses[:2]).any()
    assert torch.isfinite(losses[2])


@pytest.mark.gpu
@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("vocabulary", [1000, 128_256, 262_144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_on_a_gpu_is_the_torch_code(dtype, vocabulary, steps):
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (torch.randn(33, vocabulary, generator=generator, device="cuda") * 4).to(dtype)
    targets = torch.randint(0, vocabulary, (33,), generator=generator, device="cuda")
    targets[7:9] = IGNORED
    for weight in (1.37, torch.tensor(1.37, device="cuda")):
        kernel_matches(logits, targets, steps, 1e-5 if dtype is torch.float32 else 4e-3, weight)


@pytest.mark.gpu
def test_the_peak_on_a_gpu_is_a_few_chunks(monkeypatch):
    """8,000 rows of 128,256 logits would take 2 GB in bf16, and as much again for their gradient."""
    monkeypatch.setattr(vocabulary_loss, "CHUNK_BYTES", 64 << 20)
    head = nn.Linear(512, 128_256, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    hidden = torch.randn(8000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 128_256, (8000,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    chunked_loss(hidden, targets, head, STEPS["cap"], rows_per_chunk(128_256, 2)).backward()
    assert torch.cuda.max_memory_allocated() - before < 3 * (64 << 20) + 3 * hidden.numel() * 2


def test_steps_are_applied_in_fp32():
    logits = torch.tensor([[1.0, 40.0]], dtype=torch.bfloat16)
    assert torch.equal(apply_steps(logits, LogitSteps(scale=0.5, cap=30.0)), 30 * torch.tanh(logits.float() * 0.5 / 30))
