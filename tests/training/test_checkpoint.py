"""Checkpoints: whole, verifiable, and without pickle."""

import hashlib
import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from little_run import encoded_rows, settings
from lorafit.adapters import attach
from lorafit.backbone import load_backbone
from lorafit.errors import RunDirError
from lorafit.training import LorafitTrainer
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def trained(base, folder, **given):
    config = settings(base=base, examples_per_step=2, max_steps=6, save_steps=2, **given)
    model = attach(load_backbone(config, device="cpu"), config)
    trainer = LorafitTrainer(model, config, encoded_rows(20, 9, 30, 14, 8, 11), None, folder)
    trainer.train()
    return trainer


def test_the_last_ones_are_kept_and_their_manifests_hold(base, tmp_path):
    trained(base, tmp_path, keep_last=2)
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert folders == ["step-000004", "step-000006"]
    for folder in tmp_path.iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert present == {*manifest["files"], "manifest.json"}
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
            assert len(content) == entry["bytes"]
        assert not [name for name in present if name.endswith((".pt", ".bin", ".pth", ".pkl"))]


def test_a_checkpoint_holds_the_live_adapter_and_both_moments(base, tmp_path):
    trainer = trained(base, tmp_path)
    folder = tmp_path / "step-000006"
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    live = {
        name.replace(".default", ""): weight
        for name, weight in trainer.model.named_parameters()
        if weight.requires_grad
    }
    assert set(saved) == set(live)
    assert all(torch.equal(saved[name], live[name]) for name in saved)
    moments = load_file(folder / "optimizer.safetensors")
    assert sum(name.endswith("exp_avg") for name in moments) == len(live)
    assert sum(name.endswith("exp_avg_sq") for name in moments) == len(live)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(base, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    with pytest.raises(RunDirError, match=r"a checkpoint needs .* are free"):
        trained(base, tmp_path)
    assert not list(tmp_path.iterdir())
