"""The Trainer: its gradient is that of the examples one by one, whatever the layout or the process count."""

import math

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from gloo_worker import LENGTHS, adapted
from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.engine import collate, packed, unpacked
from lorafit.methods.lora import attach
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.requires_grad])


def one_by_one(config, rows):
    """The reference: transformers' own attention, each row alone, token losses summed, divided once."""
    model = adapted(config)
    supervised = 0
    with unpacked(model):
        for index in range(len(rows)):
            ids = torch.from_numpy(rows.ids(index).astype(np.int64))[None]
            labels = ids.masked_fill(~torch.from_numpy(rows.mask(index))[None], -100)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100).backward()
            supervised += int((labels[0, 1:] != -100).sum())
    return gradient(model) / supervised


def one_step(config, rows, folder):
    model = adapted(config)
    trainer = training_loop(model, config, rows, None, folder)
    step = trainer.steps[0]
    with packed(model):
        loss = trainer.forward_backward(step)
    return gradient(model), float(loss)


@pytest.mark.parametrize("max_length", [48, 100, 4096])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_packed_step_has_the_gradient_of_the_unpacked_one(base, tmp_path, max_length, quantization):
    rows = encoded_rows(*LENGTHS)
    config = settings(base=base, max_length=max_length, quantization=quantization, targets="all-linear")
    got, _ = one_step(config, rows, tmp_path)
    wanted = one_by_one(config, rows)
    assert float((got - wanted).norm() / wanted.norm()) <= 1e-5


def test_recomputed_activations_give_the_same_gradient(base, tmp_path):
    rows = encoded_rows(*LENGTHS)
    config = settings(base=base, max_length=100)
    kept, _ = one_step(config, rows, tmp_path)
    model = adapted(config)
    ran = []
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    recompute = config.model_copy(update={"memory_policy": "recompute"})
    trainer = training_loop(model, recompute, rows, None, tmp_path)
    step = trainer.steps[0]
    with packed(model):
        trainer.forward_backward(step)
    assert len(ran) == 2 * len(step.micro_batches), "nothing was recomputed"
    assert torch.allclose(gradient(model), kept, rtol=1e-5, atol=1e-8)


def test_the_loss_is_the_mean_over_the_steps_supervised_tokens(base, tmp_path):
    rows = encoded_rows(40, 4)  # very uneven: a mean of means would be far off
    config = settings(base=base, max_length=40)
    _, got = one_step(config, rows, tmp_path)
    model = adapted(config)
    total, supervised = 0.0, 0
    with unpacked(model), torch.no_grad():
        for index in range(2):
            batch = collate([(rows.ids(index), rows.mask(index))])
            logits = model(input_ids=batch.ids, use_cache=False).logits[0, batch.predictors]
            total += float(torch.nn.functional.cross_entropy(logits, batch.targets, reduction="sum"))
            supervised += batch.supervised
    assert got == pytest.approx(total / supervised, rel=1e-5)


def test_two_runs_with_one_seed_are_bit_identical_dropout_included(base, tmp_path):
    def train(folder, seed):
        config = settings(base=base, dropout=0.3, epochs=2, examples_per_step=4, max_length=64, seed=seed, lr=1e-3)
        model = attach(load_backbone(config, device="cpu"), config)
        training_loop(model, config, encoded_rows(*LENGTHS), None, folder).run()
        return torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])

    first, again, other = (train(tmp_path / str(i), seed) for i, seed in enumerate((0, 0, 1)))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_transformers_callbacks_see_every_step_and_evaluation(base, tmp_path):
    class Spy(TrainerCallback):
        def __init__(self):
            self.steps, self.losses, self.eval_losses = 0, [], []

        def on_step_end(self, args, state, control, **_):
            self.steps += 1

        def on_log(self, args, state, control, logs=None, **_):
            self.losses += [logs["loss"]] if "loss" in logs else []

        def on_evaluate(self, args, state, control, metrics=None, **_):
            self.eval_losses.append(metrics["eval_loss"])

    config = settings(base=base, epochs=3, examples_per_step=4, max_length=64, lr=5e-3)
    spy = Spy()
    model = attach(load_backbone(config, device="cpu"), config)
    trainer = training_loop(model, config, encoded_rows(*LENGTHS), encoded_rows(20, 9), tmp_path, callbacks=[spy])
    trainer.run()
    assert spy.steps == len(spy.losses) == 9
    assert len(spy.eval_losses) == 3
    assert trainer.evaluate()["eval_loss"] == pytest.approx(spy.eval_losses[-1])
    assert all(map(math.isfinite, spy.losses + spy.eval_losses))


def test_a_nan_loss_is_reported_as_nan(base, tmp_path):
    config = settings(base=base, max_steps=2, examples_per_step=4)
    model = attach(load_backbone(config, device="cpu"), config)
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad).fill_(float("nan"))
    trainer = training_loop(model, config, encoded_rows(*LENGTHS), None, tmp_path)
    trainer.checkpoints.save = lambda snapshot: None
    trainer.run()
    assert all(math.isnan(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_training_leaves_the_models_own_attention_as_it_was(base, tmp_path):
    """After training the model generates, merges and serves through transformers as any other."""
    config = settings(base=base, max_steps=2, examples_per_step=4)
    model = attach(load_backbone(config, device="cpu"), config)
    trainer = training_loop(model, config, encoded_rows(*LENGTHS), encoded_rows(9), tmp_path)
    trainer.run()
    assert model.config._attn_implementation == "sdpa"
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    made = model.generate(input_ids=torch.tensor([[1, 40, 50]]), max_new_tokens=3, do_sample=False)
    assert made.shape[1] > 3
    assert model.merge_and_unload().generate(input_ids=torch.tensor([[1, 40]]), max_new_tokens=2).shape[1] > 2


def test_a_run_of_one_step_learns(base, tmp_path):
    config = settings(base=base, max_steps=1, lr=1e-2)
    model = attach(load_backbone(config, device="cpu"), config)
    training_loop(model, config, encoded_rows(*LENGTHS), None, tmp_path).run()
    assert any(float(weight.abs().sum()) > 0 for name, weight in model.named_parameters() if ".lora_B." in name)


def test_every_module_trains_in_a_step_and_none_in_an_evaluation(base, tmp_path):
    """PEFT's wrapper is made in training mode over a base in evaluation mode: the flag of the whole says nothing."""
    config = settings(base=base, max_steps=3, examples_per_step=4, eval_steps=1, dropout=0.3)
    model = attach(load_backbone(config, device="cpu"), config)
    seen = []

    def look(*_):
        seen.append({module.training for module in model.modules()})

    model.get_base_model().model.layers[0].register_forward_pre_hook(look)
    training_loop(model, config, encoded_rows(*LENGTHS), encoded_rows(9), tmp_path).run()
    assert seen == [{True}, {False}] * 3
