"""LorafitTrainer: a Trainer to whoever expects one, the loop in everything it does."""

import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from little_trainer import trainer
from lorafit.training.trainer import LorafitTrainer
from tiny_models import save_base


class Count(TrainerCallback):
    steps = 0

    def on_step_end(self, args, state, control, **_):
        self.steps += 1


def test_it_trains_evaluates_and_saves_by_the_loop_and_shows_its_state(tmp_path):
    loop = trainer(str(save_base(tmp_path / "base")), tmp_path / "checkpoints", max_steps=2)
    face, count = LorafitTrainer(loop), Count()
    assert isinstance(face, Trainer)
    face.add_callback(count)
    face.train()
    assert (count.steps, face.state.global_step, face.state) == (2, 2, loop.state)
    assert face.optimizer is loop.optimizer
    assert face.evaluate() == {"eval_loss": loop.held_out_loss(loop.held_out_rows)}
    face.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    live = dict(loop.model.named_parameters())
    assert all(torch.equal(weight, live[name.replace(".weight", ".default.weight")]) for name, weight in saved.items())
