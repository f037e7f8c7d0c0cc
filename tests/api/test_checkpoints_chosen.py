"""--checkpoint: which weights of a run are merged, exported, answered with and served."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from little_run import write_rows
from lorafit.api.load import load
from lorafit.api.merge import merge
from lorafit.api.ship.export import export
from lorafit.demo import BASE
from lorafit.errors import CheckpointError, UsageError
from lorafit.runs import RunDir, RunIdentity, choose_weights
from lorafit.runs.checkpoint import read_manifest
from lorafit.serve.adapters import ServedBase
from lorafit.serve.adapters.source import open_adapter


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory):
    """A run whose held-out loss is lowest before its end, evaluated more often than it saves.

    Its learning rate rises until the loss does, by several nats. At 0.05 the best step depended on the processor.
    """
    from lorafit.api.train import train

    folder = tmp_path_factory.mktemp("overfitted")
    data = write_rows(folder / "rows.jsonl", 20)
    settings = {"lr": 2.0, "max_steps": 4, "holdout": 0.3, "examples_per_step": 4, "eval_steps": 1, "save_steps": 4}
    return train(data, str(BASE), out=folder / "run", schedule="constant", warmup=0.9, max_grad_norm=100, **settings)


def measured(run):
    lines = map(json.loads, run.metrics.read_text().splitlines())
    return {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}


def test_the_checkpoint_with_the_lowest_held_out_loss_is_kept_and_named(overfitted):
    losses = measured(overfitted.run)
    step = min(losses, key=losses.get)
    assert len(losses) == 4 and step < 4, "the run must get worse after its best step"
    assert overfitted.best == (step, losses[step])
    assert overfitted.to_dict()["best"] == {"step": step, "eval_loss": losses[step]}
    best = choose_weights(overfitted.run, "best")
    assert best.step == step and best.eval_loss == losses[step]
    assert choose_weights(overfitted.run, f"step-{step:06d}") == choose_weights(overfitted.run, str(step)) == best
    assert choose_weights(overfitted.run).folder == choose_weights(overfitted.run, "4").folder == overfitted.run.adapter


def test_a_merge_of_the_best_checkpoint_has_its_weights_and_its_loss(overfitted):
    step, loss = overfitted.best
    merged = merge(overfitted.run.path, checkpoint="best", onto="quantized")
    assert merged.passed and merged.report.step == step
    assert merged.folder.name == f"merged-quantized-step-{step:06d}"
    lineage = json.loads((merged.folder / "lineage.json").read_text())
    assert lineage["steps"] == step and lineage["eval_loss"] == loss
    last = merge(overfitted.run.path, onto="quantized")
    assert last.report.step is None and last.folder.name == "merged-quantized"
    assert last.verification.live_loss > merged.verification.live_loss + 0.1
    assert json.loads((last.folder / "lineage.json").read_text())["steps"] == 4


def test_chat_and_the_exported_adapter_take_the_best_checkpoint_too(overfitted, tmp_path):
    step, _ = overfitted.best
    session = load(overfitted.run.path, checkpoint="best")
    kept = load_file(overfitted.run.checkpoints / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors")
    live = dict(session.engine.model.named_parameters())
    for name, tensor in kept.items():
        assert torch.equal(live[name.replace(".weight", ".default.weight")], tensor)
    exported = export(overfitted.run.path, to="adapter", out=tmp_path / "served", name="best", checkpoint="best")
    assert exported.passed
    written = load_file(exported.proved_in / "adapter_model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in kept.items())
    assert json.loads((exported.proved_in / "lineage.json").read_text())["steps"] == step
    assert f"| optimizer steps | {step} |" in (exported.proved_in / "README.md").read_text()


def test_a_server_takes_a_checkpoint_by_name_and_by_its_folder(overfitted):
    from lorafit.backbone import load_backbone

    step, _ = overfitted.best
    base = ServedBase.of_run(overfitted.run.path)
    model = load_backbone(base.config)
    roots = [overfitted.run.path.resolve()]
    last, _ = open_adapter("a", overfitted.run.path, base, model, roots)
    best, _ = open_adapter("a", overfitted.run.path, base, model, roots, "best")
    folder, _ = open_adapter("a", overfitted.run.checkpoints / f"step-{step:06d}", base, model, roots)
    assert best.identity == folder.identity != last.identity
    assert best.folder == overfitted.run.checkpoints / f"step-{step:06d}" / "adapter"


@pytest.mark.parametrize("name", ["7000", "first", "", "-1", "step-", "step-99", "²"])
def test_a_checkpoint_that_is_not_kept_is_refused_with_those_that_are(overfitted, name):
    with pytest.raises(UsageError, match=r"is no checkpoint of this run; choose last, best or .*4"):
        choose_weights(overfitted.run, name)


def test_a_damaged_best_checkpoint_is_refused_and_never_replaced_by_the_second(overfitted, tmp_path):
    step, _ = overfitted.best
    copy = RunDir(shutil.copytree(overfitted.run.path, tmp_path / "run"))
    weights = copy.checkpoints / f"step-{step:06d}" / "adapter" / "adapter_model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"SHA-256 differs.*choose another checkpoint"):
        choose_weights(copy, "best")
    manifest = weights.parent.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"eval_loss": ', '"eval_loss": 9'))
    with pytest.raises(CheckpointError, match="manifest is damaged"):
        choose_weights(copy, "best")
    assert choose_weights(copy).folder == copy.adapter


def test_a_checkpoint_of_another_run_is_refused(overfitted, tiny_run, tmp_path):
    copy = RunDir(shutil.copytree(tiny_run.run.path, tmp_path / "run"))
    step, _ = overfitted.best
    shutil.copytree(overfitted.run.checkpoints / f"step-{step:06d}", copy.checkpoints / f"step-{step:06d}")
    assert read_manifest(copy.checkpoints / f"step-{step:06d}")["run"] != RunIdentity.read(copy.identity).run
    with pytest.raises(CheckpointError, match="it belongs to another run"):
        choose_weights(copy, str(step))


def test_a_merged_model_has_no_checkpoints(overfitted):
    folder = overfitted.run.exports / "merged"
    if not folder.exists():
        merge(overfitted.run.path)
    with pytest.raises(UsageError, match="a merged model has no checkpoints; name the run instead"):
        load(folder, checkpoint="best")
