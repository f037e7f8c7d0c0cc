"""Checkpoints: whole, verifiable, and without pickle; a disk that refuses ends no run."""

import hashlib
import json
import os
import random
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.errors import CheckpointError
from lorafit.methods.lora import attach
from lorafit.runs import Checkpoint
from lorafit.runs.checkpoint import checkpoint_folders, prune, seal
from lorafit.training.checkpoints.snapshot import Snapshot
from tiny_models import save_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base")))


def make_trainer(base, folder, **given):
    config = settings(base=base, **{"examples_per_step": 2, "max_steps": 6, "save_steps": 2, **given})
    model = attach(load_backbone(config, device="cpu"), config)
    return training_loop(model, config, encoded_rows(20, 9, 30, 14, 8, 11), None, folder, run="r")


def trained(base, folder, **given):
    trainer = make_trainer(base, folder, **given)
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return trained(base, folder), folder


def kinds(trainer):
    return [(event.kind, event.step) for event in trainer.events.seen]


def test_the_last_ones_are_kept_and_their_manifests_hold(whole):
    _, run = whole
    assert [path.name for path in checkpoint_folders(run)] == ["step-000004", "step-000006"]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    for folder in run.iterdir():
        manifest = json.loads((folder / "manifest.json").read_text())
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert present == {*manifest["files"], "manifest.json"}
        for name, entry in manifest["files"].items():
            content = (folder / name).read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["sha256"]
            assert len(content) == entry["bytes"]
        assert {path.rpartition(".")[2] for path in present} == {"json", "safetensors"}  # no pickle
        assert Checkpoint.open(folder, run="r").step == int(folder.name[-6:])


def test_a_checkpoint_holds_the_live_adapter_and_both_moments(whole):
    trainer, run = whole
    folder = run / "step-000006"
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


@pytest.fixture
def copied(whole, tmp_path):
    folder = tmp_path / "step-000006"
    shutil.copytree(whole[1] / "step-000006", folder)
    return folder


FILES = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "optimizer.safetensors")
FILES += ("random.safetensors", "trainer_state.json", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_emptied_gone_or_changed_by_a_bit_is_named(copied, name):
    path, draw = copied / name, random.Random(0)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    for damaged in (content[:-1], content[: len(content) // 2], b"", bytes(flipped), content + b" "):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="manifest" if "manifest" in name else name):
            Checkpoint.open(copied)
    path.unlink()
    with pytest.raises(CheckpointError, match="manifest" if "manifest" in name else f"{name} is missing"):
        Checkpoint.open(copied)


def test_no_flipped_bit_of_a_manifest_passes(copied):
    path = copied / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 5):  # the second turns a letter's case, or a blank into NUL
            path.write_bytes(content[:place] + bytes([content[place] ^ (1 << bit)]) + content[place + 1 :])
            with pytest.raises(CheckpointError):
                Checkpoint.open(copied)


def test_what_the_manifest_does_not_name_is_not_trusted(copied):
    (copied / "extra.pt").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"extra\.pt is not in its manifest"):
        Checkpoint.open(copied)


def test_a_checkpoint_of_another_run_or_step_is_refused(copied):
    with pytest.raises(CheckpointError, match="another run"):
        Checkpoint.open(copied, run="other")
    renamed = copied.rename(copied.with_name("step-000008"))
    with pytest.raises(CheckpointError, match="belongs to step 6"):
        Checkpoint.open(renamed)


def test_files_have_the_modes_the_umask_asks_for(base, tmp_path):
    before = os.umask(0o027)
    try:
        trained(base, tmp_path, max_steps=2)
    finally:
        os.umask(before)
    for path in (tmp_path / "step-000002").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def scored(folder, step, loss):
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / "data.json").write_text("{}")
    seal(path, run="r", step=step, eval_loss=loss)


def test_the_best_are_kept_beside_the_newest(tmp_path):
    for step, loss in ((10, 3.0), (20, 1.0), (30, None), (40, 2.0), (50, 2.5), (60, 4.0)):
        scored(tmp_path, step, loss)
    prune(tmp_path, keep_last=2, keep_best=2)
    assert [int(path.name[5:]) for path in checkpoint_folders(tmp_path)] == [20, 40, 50, 60]
    prune(tmp_path, keep_last=1, keep_best=0)
    assert [int(path.name[5:]) for path in tmp_path.iterdir()] == [60]


def test_a_checkpoint_knows_the_held_out_loss_of_its_step(base, tmp_path):
    config = settings(base=base, examples_per_step=2, max_steps=4, save_steps=1, eval_steps=2, keep_last=9)
    model = attach(load_backbone(config, device="cpu"), config)
    trainer = training_loop(model, config, encoded_rows(20, 9, 30, 14, 8, 11), encoded_rows(12), tmp_path)
    trainer.run()
    losses = [Checkpoint.open(path).eval_loss for path in checkpoint_folders(tmp_path)]
    assert [loss is None for loss in losses] == [True, False, True, False]
    assert losses[1::2] == [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def test_a_full_disk_is_said_the_last_good_one_stays_and_the_next_save_tries_again(base, tmp_path, monkeypatch):
    usage, real, calls = namedtuple("usage", "total used free"), shutil.disk_usage, []

    def full_at_the_second(path):
        calls.append(path)
        return usage(10, 10, 0) if len(calls) == 2 else real(path)

    monkeypatch.setattr(shutil, "disk_usage", full_at_the_second)
    trainer = trained(base, tmp_path)
    assert kinds(trainer) == [("checkpoint_failed", 4)]
    assert "step-000002 is kept" in trainer.events.seen[0].message
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-000002", "step-000006"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_disk_that_fails_in_the_middle_of_a_file_leaves_no_half_checkpoint(base, tmp_path, monkeypatch):
    from lorafit.training.checkpoints import snapshot

    real = snapshot.save_file

    def fails_once(tensors, path):
        monkeypatch.setattr(snapshot, "save_file", real)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "save_file", fails_once)
    trainer = trained(base, tmp_path)
    assert kinds(trainer) == [("checkpoint_failed", 2)]
    assert "No space left on device" in trainer.events.seen[0].message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006"]


def test_numbers_that_are_not_finite_are_never_saved(base, tmp_path):
    trainer = make_trainer(base, tmp_path, max_steps=1, save_steps=1)
    trainer.run()
    with torch.no_grad():
        next(weight for weight in trainer.model.parameters() if weight.requires_grad)[0, 0] = float("nan")
    trainer.state.global_step = 2
    trainer.checkpoints.save(Snapshot.of(trainer))
    trainer.checkpoints.wait()
    assert kinds(trainer) == [("checkpoint_failed", 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_training_goes_on_while_a_checkpoint_is_written(base, tmp_path, monkeypatch):
    """The snapshot is of its step, however long the disk takes and whatever training does meanwhile."""
    import threading

    from lorafit.training.checkpoints import writer

    stepped, real = threading.Event(), writer.seal

    def slow(*given, **options):
        assert stepped.wait(30), "the training thread waited for the disk"
        real(*given, **options)

    monkeypatch.setattr(writer, "seal", slow)

    class Stepped(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                stepped.set()

    trainer = make_trainer(base, tmp_path, max_steps=2, save_steps=1, keep_last=9)
    trainer.callbacks.handler.add_callback(Stepped())
    trainer.run()
    assert [Checkpoint.open(path).step for path in checkpoint_folders(tmp_path)] == [1, 2]
    one, two = (load_file(path / "adapter" / "adapter_model.safetensors") for path in checkpoint_folders(tmp_path))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_a_fault_of_ours_in_the_writing_thread_is_not_lost(base, tmp_path, monkeypatch):
    from lorafit.training.checkpoints import writer

    monkeypatch.setattr(writer, "seal", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trained(base, tmp_path)
