"""A training loop over a tiny run, and whether two of them ended in the same bits."""

import torch

from little_run import encoded_rows, settings
from lorafit.backbone import load_backbone
from lorafit.methods import method_of
from lorafit.objectives import Sft
from lorafit.runs.signals import StopSignals
from lorafit.training import RunContext, TrainingLoop
from lorafit.training.checkpoints.snapshot import Snapshot

LENGTHS = (20, 9, 30, 14, 8, 11, 25, 17, 12, 21)


def training_loop(model, config, rows, held_out, folder, memory=None, **given):
    """A loop over `model`, whose method and objective are those of `config`; `given` are fields of the context."""
    return TrainingLoop(model, method_of(config), Sft(), config, rows, held_out, RunContext(folder, **given), memory)


def trainer(base, folder, callbacks=(), signals=None, **given):
    options = {"dropout": 0.2, "examples_per_step": 3, "max_length": 40, "lr": 1e-2, "save_steps": 1, "eval_steps": 3}
    config = settings(base=base, **{**options, "max_steps": 10, "keep_last": 99, **given})
    model = method_of(config).prepare(load_backbone(config, device="cpu"), config)
    rows, held_out = encoded_rows(*LENGTHS), encoded_rows(18, 9, 30, 22, seed=1)
    return training_loop(model, config, rows, held_out, folder, callbacks=callbacks, signals=signals or StopSignals())


def bits(one):
    """Everything of a loop that a later step depends on, and its history."""
    snapshot = Snapshot.of(one)
    tensors = {**snapshot.trained.tensors, **snapshot.optimizer, **snapshot.random}
    return {name: tensor.clone() for name, tensor in tensors.items()}, snapshot.rest, snapshot.trainer_state


def assert_same(one, two):
    for first, second in zip(bits(one), bits(two), strict=True):
        assert first.keys() == second.keys()
        for name in first:
            same = (
                torch.equal(first[name], second[name]) if torch.is_tensor(first[name]) else first[name] == second[name]
            )
            if name != "log_history":
                assert same, name
    histories = [[entry for entry in run.state.log_history if "train_runtime" not in entry] for run in (one, two)]
    assert histories[0] == histories[1]
