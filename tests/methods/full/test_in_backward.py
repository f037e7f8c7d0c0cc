"""Weights updated within the backward pass: the run of an optimizer that waits for its end, and its guards."""

import pytest
import torch
from bitsandbytes.optim import AdamW

from little_run import encoded_rows, settings
from little_trainer import assert_same, bits, trainer, training_loop
from lorafit.backbone import load_backbone
from lorafit.errors import TrainingError
from lorafit.methods import METHODS
from lorafit.methods.full import moments_ahead, optimizer
from lorafit.methods.full.in_backward import StepInBackward, gradients_as_in_steps
from lorafit.training import deterministic
from lorafit.training.updates import undo
from tiny_models import save_base

SETTINGS = {"method": "full", "compute": "bf16", "lr": 1e-3, "max_steps": 6, "save_steps": 3, "eval_steps": 99}


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="its model is on the CPU")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base"), "llama-tied"))


def run(base, folder, kind="paged_adamw_8bit", checkpoint=None, **given):
    made = trainer(base, folder, optimizer=kind, **{**SETTINGS, **given})
    made.run(checkpoint)
    return made


@on_cpu
def test_the_bits_are_those_of_updates_after_the_backward_pass(base, tmp_path, monkeypatch):
    """Steps have several micro-batches. Only the order of the chances differs, so they are left out here."""
    monkeypatch.setattr(optimizer, "stochastically_rounded", lambda wide: wide.bfloat16())
    for module in (optimizer, moments_ahead):
        monkeypatch.setattr(module, "CHUNK", 512)
    within, after = (run(base, tmp_path / kind, kind, max_grad_norm=1e6) for kind in ("paged_adamw_8bit", "adamw_8bit"))
    assert isinstance(within.optimizer, StepInBackward) and not isinstance(after.optimizer, StepInBackward)
    (ours, *_), (theirs, *_) = bits(within), bits(after)
    names = [name for name in ours if name != "cpu"]
    assert len(names) > 40 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in names)
    norms = [[entry["grad_norm"] for entry in one.state.log_history if "grad_norm" in entry] for one in (within, after)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)  # the other one is computed in bf16


@on_cpu
def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path):
    whole = run(base, tmp_path / "whole")
    assert_same(whole, run(base, tmp_path / "again", checkpoint=tmp_path / "whole" / "step-000003"))


def made(most=1.0, micro_batches=1, weights=None):
    torch.manual_seed(0)
    weights = weights or [torch.nn.Parameter(torch.randn(80, 64).bfloat16()) for _ in range(2)]
    ours = StepInBackward(AdamW, [{"params": weights}], {"lr": 1e-2, "optim_bits": 8, "is_paged": True})
    ours.begin(micro_batches, most)
    return ours, weights


def test_each_gradient_is_clipped_by_itself_and_freed():
    ours, (one, two) = made(most=3.0)
    ((5 * one).sum() + (one + two).mean()).backward()
    assert one.grad is None and two.grad is None
    first = ours.state[one]["absmax1"].max()  # a tenth of the largest gradient
    assert float(first) == pytest.approx(0.1 * 3.0 / 5120**0.5, rel=1e-2)
    assert float(ours.finish()) == pytest.approx(5 * 5120**0.5, rel=1e-2)


def test_no_weight_is_updated_after_a_gradient_that_is_not_finite():
    ours, (one, two) = made()
    before = [weight.detach().clone() for weight in (one, two)]
    (one.sum() * float("nan")).backward()
    two.sum().backward()
    assert all(map(torch.equal, (one, two), before))
    assert not ours.finish().isfinite() and not ours.is_torn


def test_moments_come_in_the_order_of_the_step_before_or_when_they_are_asked_for(monkeypatch):
    """Each update adds 1, so that a part that comes late, twice or from another place shows."""
    monkeypatch.setattr(moments_ahead, "CHUNK", 512)
    moments, scales = torch.zeros(1024, dtype=torch.uint8), torch.zeros(4)
    states = [{name: (moments if "state" in name else scales).clone() for name in optimizer.MOMENTS} for _ in range(3)]
    ahead, updates = moments_ahead.MomentsAhead(torch.device("cpu")), [0, 0, 0]
    for order in ((0, 1, 2), (0, 1, 2), (1, 0, 2), (0,), (2, 1, 0), (2, 1, 0)):
        ahead.begin()
        for number in order:
            for part in (slice(0, 512), slice(512, 1024)):
                for value in ahead.take(states[number], part, 1024).values():
                    value += 1
                ahead.put_back()
            updates[number] += 1
    for state, count in zip(states, updates, strict=True):
        assert all(bool((value == count).all()) for value in state.values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_moments_that_travel_beside_the_updates_have_the_bits_of_moments_that_stay():
    """Weights of several chunks and of a part of one, over steps in which nothing waits for the copies."""
    torch.manual_seed(0)
    sizes, options = ((9000, 4096), (3000, 4096), (64, 4096), (40,)), {"lr": 1e-2, "optim_bits": 8}
    drawn = [torch.randn(size, device="cuda").bfloat16() for size in sizes]
    ours, theirs = ([torch.nn.Parameter(one.clone()) for one in drawn] for _ in range(2))
    travel = StepInBackward(AdamW, [{"params": ours}], {**options, "is_paged": True})
    stay = optimizer.with_stochastic_rounding(AdamW)([{"params": theirs}], **options)
    for step in range(6):
        gradients = [torch.randn_like(one) for one in drawn]
        torch.manual_seed(step)
        travel.begin(1, float("inf"))
        for weight, gradient in zip(ours, gradients, strict=True):
            weight.grad = gradient.clone()
            travel._arrived(weight)
        travel.finish()
        torch.manual_seed(step)
        for weight, gradient in zip(theirs, gradients, strict=True):
            weight.grad = gradient
        stay.step()
    torch.cuda.synchronize()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        for name in optimizer.MOMENTS & stay.state[other].keys():
            assert torch.equal(travel.state[one][name].cpu(), stay.state[other][name].cpu()), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_copies_beside_a_run_change_no_bit_of_it(tmp_path, monkeypatch):
    """Twice with streams for the copies, and once on the stream that computes: a race would show in weights."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(optimizer, "CHUNK", 1 << 20)
    monkeypatch.setattr(moments_ahead, "CHUNK", 1 << 20)
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    given = {**SETTINGS, "optimizer": "paged_adamw_8bit", "max_steps": 12, "save_steps": 12, "lr": 1e-4}
    base = str(save_base(tmp_path / "base", **sizes))
    config = settings(base=base, examples_per_step=4, max_length=512, deterministic=True, **given)
    ends = []
    with deterministic(True):
        for name in ("beside", "again", "in one stream"):
            if name == "in one stream":
                monkeypatch.setattr(moments_ahead, "_stream", lambda device: None)
            torch.manual_seed(0)
            model = METHODS["full"].prepare(load_backbone(config), config)
            loop = training_loop(model, config, encoded_rows(*[500] * 24), None, tmp_path / name)
            loop.run(None)
            assert isinstance(loop.optimizer, StepInBackward)
            ends.append(bits(loop))
    for (tensors, *_), name in zip(ends[1:], ("again", "in one stream"), strict=True):
        assert all(torch.equal(ends[0][0][key], tensor) for key, tensor in tensors.items()), name


def test_a_step_that_failed_half_way_is_not_repeated():
    ours, (one, two) = made()
    undo(ours, [one, two])
    one.sum().backward()
    with pytest.raises(TrainingError, match="whose first weights are updated already"):
        undo(ours, [one, two])


def test_a_weight_without_a_gradient_in_the_last_micro_batch_is_updated_all_the_same():
    ours, (one, two) = made(micro_batches=2)
    before = one.detach().clone()
    (one.sum() + two.sum()).backward()
    assert torch.equal(one, before)
    two.sum().backward()
    ours.finish()
    assert not torch.equal(one, before)


def test_a_dry_run_keeps_no_gradient():
    weight = torch.nn.Parameter(torch.ones(4))
    with gradients_as_in_steps([weight]):
        weight.sum().backward()
        assert weight.grad is None
    weight.sum().backward()
    assert weight.grad is not None


def test_a_new_optimizer_takes_the_weights_over():
    """A rollback builds another one, and the first must not go on to update."""
    ours, weights = made()
    then, _ = made(weights=weights)
    weights[0].sum().backward()
    assert not ours.state and len(then.state) == 1
