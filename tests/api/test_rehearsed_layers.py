"""What the rehearsal runs is what training runs."""

import torch
from transformers import TrainingArguments

from little_run import encoded_rows, settings
from lorafit.adapters import attach
from lorafit.api.rehearsed_layers import _work
from lorafit.backbone import load_backbone
from lorafit.training import LorafitTrainer
from lorafit.training import trainer as trainer_module


def test_the_rehearsal_computes_under_the_autocast_of_training(tmp_path, monkeypatch):
    made = trainer_module.training_arguments

    def in_bf16(*given, **options):
        arguments = made(*given, **options).to_dict() | {"bf16": True, "output_dir": str(tmp_path)}
        known = TrainingArguments.__dataclass_fields__
        return TrainingArguments(**{key: value for key, value in arguments.items() if key in known})

    monkeypatch.setattr(trainer_module, "training_arguments", in_bf16)
    config = settings(max_steps=1, rank=2)
    model = attach(load_backbone(config), config)
    trainer = LorafitTrainer(model, config, encoded_rows(9, 12, 15), None, tmp_path)
    seen = []

    def note(*_):
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), model.training))

    handle = model.get_base_model().get_decoder().layers[0].register_forward_pre_hook(note)
    work = _work(trainer)
    work.loss_of(work.batch_of(config.max_tokens))
    trainer.train()
    handle.remove()
    assert len(seen) == 2 and seen[0] == seen[1] == (True, torch.bfloat16, True)


def test_the_largest_micro_batch_is_rehearsed(tmp_path):
    config = settings(max_steps=1, rank=2, max_tokens=64, examples_per_step=4)
    model = attach(load_backbone(config), config)
    rows = encoded_rows(9, 12, 15, 30, 31, 32, 20, 8)
    work = _work(LorafitTrainer(model, config, rows, None, tmp_path))
    assert work.longest == 32
    assert 32 < work.batch_of(64).tokens <= 64
    assert work.batch_of(16).tokens == 32  # a row is never cut
