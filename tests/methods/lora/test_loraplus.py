"""LoRA+: B learns at a multiple of A's rate, as in PEFT's own optimizer, and a run resumes to the same bits."""

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from little_trainer import assert_same, trainer
from lorafit.training.transformers_parts import build_lr_scheduler, build_optimizer
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def test_one_step_is_that_of_pefts_loraplus(base, tmp_path):
    given = {"loraplus_lr_ratio": 16.0, "weight_decay": 0.1, "lr": 1e-3, "schedule": "constant", "warmup": 0.0}
    loop = trainer(base, tmp_path / "ours", max_steps=2, dropout=0.0, **given)
    optimizer = build_optimizer(loop.trained, loop.arguments, loop.model, loop.method, loop.config)
    build_lr_scheduler(optimizer, loop.arguments)
    before = [weight.detach().clone() for weight in loop.trained]
    gradients = [torch.randn_like(weight) for weight in loop.trained]

    def stepped(one):
        for weight, first, gradient in zip(loop.trained, before, gradients, strict=True):
            weight.data.copy_(first)
            weight.grad = gradient.clone()
        one.step()
        return [weight.detach().clone() for weight in loop.trained]

    ours = stepped(optimizer)
    options = {"eps": 1e-8, "betas": (0.9, 0.999), "loraplus_weight_decay": 0.1}
    reference = create_loraplus_optimizer(loop.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, **options)
    for mine, theirs in zip(ours, stepped(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-3, 16e-3]


def test_a_resumed_run_ends_in_the_same_bits(base, tmp_path):
    given = {"loraplus_lr_ratio": 8.0, "max_steps": 6, "lr": 2e-3}
    whole = trainer(base, tmp_path / "whole", **given)
    whole.run()
    again = trainer(base, tmp_path / "again", **given)
    again.run(tmp_path / "whole" / "step-000003")
    assert_same(whole, again)
    plain = trainer(base, tmp_path / "plain", max_steps=6, lr=2e-3)
    plain.run()
    assert not torch.equal(plain.trained[1], whole.trained[1])
