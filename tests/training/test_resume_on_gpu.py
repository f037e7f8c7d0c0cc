"""On a GPU, with --deterministic: a run that goes on ends in the bits it would have had, 8-bit moments too."""

import os

import pytest
import torch

from little_run import encoded_rows, settings
from little_trainer import assert_same, training_loop
from lorafit.backbone import load_backbone
from lorafit.methods.lora import attach
from lorafit.training import deterministic
from tiny_models import save_base

pytestmark = pytest.mark.gpu

LENGTHS = (200, 90, 120, 140, 80, 110, 250, 170)


def trainer(base, folder, **given):
    options = {"dropout": 0.2, "examples_per_step": 3, "max_length": 400, "lr": 1e-2, "save_steps": 1, "eval_steps": 3}
    config = settings(base=base, **{**options, "max_steps": 8, "keep_last": 99, "targets": "all-linear", **given})
    torch.manual_seed(config.seed)
    model = attach(load_backbone(config), config)
    return training_loop(model, config, encoded_rows(*LENGTHS), encoded_rows(180, 90, seed=1), folder)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, optimizer, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"))
    base = str(save_base(tmp_path / "base", hidden_size=256, max_position_embeddings=512))
    with deterministic(True):
        whole = trainer(base, tmp_path / "whole", optimizer=optimizer)
        whole.run()
        again = trainer(base, tmp_path / "again", optimizer=optimizer)
        again.run(tmp_path / "whole" / "step-000004")
    assert_same(whole, again)


def test_paged_moments_are_paged_again_after_a_resume(tmp_path):
    base = str(save_base(tmp_path / "base", hidden_size=512, max_position_embeddings=512))
    given = {"optimizer": "paged_adamw_8bit", "rank": 256, "max_steps": 3}
    trainer(base, tmp_path / "whole", **given).run()
    again = trainer(base, tmp_path / "again", **given)
    again.run(tmp_path / "whole" / "step-000002")
    inner = again.optimizer
    paged = [state["state1"] for state in inner.state.values() if getattr(state["state1"], "is_paged", False)]
    assert paged, "no tensor of this run is large enough to be paged"
