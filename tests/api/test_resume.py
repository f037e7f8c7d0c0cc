"""train on a folder that holds a run: it goes on, says it is finished, or refuses; never anything in silence."""

import contextlib
import errno
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from little_run import Send, settings, write_rows
from lorafit.api.manifest import environment, layout_of, resume_from
from lorafit.api.observer import Observer
from lorafit.api.train import train
from lorafit.cli import main
from lorafit.config.memory_policy import MemoryPolicy
from lorafit.errors import DataError, RunDirError, RunFinished, TrainingStopped
from lorafit.methods.lora.lora import Lora
from lorafit.runs import RunDir, RunIdentity, RunLock, writing
from lorafit.training import EventLog, TunedMemory

SETTINGS = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "examples_per_step": 4, "lr": 5e-3, "holdout": 0.2}
RESULTS = ("adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-000006/optimizer.safetensors")


class Killed(BaseException):
    """What nobody catches, as a kill."""


class Watch(Observer):
    def __init__(self):
        self.events, self.signals = [], []

    def on_event(self, event):
        self.events.append((event.kind, event.step))

    def on_stopping(self, signal_number):
        self.signals.append(signal_number)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(*made, out=folder, **SETTINGS)
    return folder


@pytest.fixture(scope="module")
def stopped_once(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "run"
    watch = Watch()
    with pytest.raises(TrainingStopped) as caught:
        train(*made, out=folder, observer=watch, callbacks=[Send(signal.SIGTERM, 5)], **SETTINGS)
    return folder, caught.value, watch


@pytest.fixture
def stopped(stopped_once, tmp_path):
    return shutil.copytree(stopped_once[0], tmp_path / "run")


def assert_same(one, two):
    for name in RESULTS:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_a_stopped_run_says_where_it_is_and_how_to_go_on(stopped_once):
    folder, error, watch = stopped_once
    assert error.exit_code == 143
    assert watch.signals == [signal.SIGTERM]
    assert str(error) == (
        f"{folder}: SIGTERM after step 5 of 6; the newest checkpoint is step-000005; "
        f"resume with: lorafit train {folder}/run.yaml --out {folder}"
    )
    assert not (folder / ".lock").exists()


def test_the_same_call_goes_on_and_ends_in_the_same_bits(made, whole, stopped):
    watch = Watch()
    trained = train(*made, out=stopped, observer=watch, **SETTINGS)
    assert watch.events == [("resumed", 5)]
    assert_same(whole, stopped)
    lines = [json.loads(line) for line in (stopped / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert trained.steps == 6
    assert trained.loss == lines[-2]["loss"]
    assert trained.eval_loss == lines[-1]["eval_loss"]


def test_the_printed_command_goes_on_too(whole, stopped, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(stopped / "run.yaml"), "--out", str(stopped), "--json"])
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out)["steps"] == 6
    assert_same(whole, stopped)


def test_a_damaged_newest_checkpoint_is_passed_over_and_named(made, whole, stopped):
    (stopped / "checkpoints" / "step-000005" / "optimizer.safetensors").write_bytes(b"")
    watch = Watch()
    train(*made, out=stopped, observer=watch, **SETTINGS)
    assert watch.events == [("checkpoint_damaged", 5), ("resumed", 4)]
    events = (stopped / "events.jsonl").read_text()
    assert "step-000005 is skipped: optimizer.safetensors has 0 of" in events
    assert (stopped / "checkpoints" / "step-000005.damaged").is_dir()
    assert_same(whole, stopped)


@pytest.mark.parametrize("last", ["held-out.jsonl", "fingerprint.json", "run.yaml"])
def test_a_run_killed_while_it_describes_itself_begins_again(made, whole, tmp_path, monkeypatch, last):
    """Everything that is written before run.yaml lies there then, and is no obstacle."""
    from lorafit.api import manifest
    from lorafit.api import train as room
    from lorafit.runs import run_dir

    real = run_dir.write_text

    def killed(path, text):
        if path.name == last:
            path.with_name(f".{last}.staged").write_text(text[:3])
            raise Killed
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "write_text", killed)
        patch.setattr(manifest, "write_text", killed)
        patch.setattr(room, "_leave_nothing", lambda *_: None)  # as a kill would
        with pytest.raises(Killed):
            train(*made, out=tmp_path / "run", **SETTINGS)
    assert not RunDir(tmp_path / "run").holds_run
    train(*made, out=tmp_path / "run", **SETTINGS)
    assert_same(whole, tmp_path / "run")


def test_without_any_whole_checkpoint_the_run_begins_again_and_says_so(made, whole, stopped):
    shutil.rmtree(stopped / "checkpoints")
    watch = Watch()
    train(*made, out=stopped, observer=watch, **SETTINGS)
    assert watch.events == [("resumed", 0)]
    assert_same(whole, stopped)


def test_a_run_killed_between_its_last_checkpoint_and_its_adapter_only_writes_that(made, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "adapter")
    (run / "metrics.jsonl").unlink()
    trained = train(*made, out=run, **SETTINGS)
    assert trained.tokens == 0
    assert_same(whole, run)


def test_an_evaluation_owed_after_the_last_step_is_made_up_for(made, whole, tmp_path, monkeypatch):
    from lorafit.training import TrainingLoop

    real = TrainingLoop.held_out_loss

    def interrupted(self, rows, **options):
        if self.state.global_step == 6:
            self.signals.stop = signal.SIGTERM
        return real(self, rows, **options)

    monkeypatch.setattr(TrainingLoop, "held_out_loss", interrupted)
    with pytest.raises(TrainingStopped, match="after step 6 of 6"):
        train(*made, out=tmp_path / "run", **SETTINGS)
    monkeypatch.undo()
    trained = train(*made, out=tmp_path / "run", **SETTINGS)
    assert trained.eval_loss is not None
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_what_may_change_does_not_stop_a_run_from_going_on(made, stopped):
    changed = {**SETTINGS, "save_steps": 1, "keep_last": 5, "eval_steps": 100, "max_length": 1024}
    watch = Watch()
    train(*made, out=stopped, observer=watch, **changed)
    assert watch.events == [("resumed", 5), ("environment_changed", 5)]
    assert "micro_tokens was 2048 and is 1024" in (stopped / "events.jsonl").read_text()
    kept = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    assert kept == ["step-000003", "step-000004", "step-000005", "step-000006"], "the best evaluation's stays too"


def test_a_finished_run_is_not_trained_again(made, whole):
    before = (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(RunFinished, match="this run is complete"):
        train(*made, out=whole, **SETTINGS)
    assert (whole / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_other_rows_are_refused_and_nothing_of_the_run_changes(made, whole, stopped, tmp_path, state):
    rows, base = made
    run = stopped if state == "stopped" else shutil.copytree(whole, tmp_path / "finished")
    lines = rows.read_text().splitlines(keepends=True)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    for changed in ([*lines[1:], lines[0]], lines[:-1]):  # another order, and a row less
        other = tmp_path / "rows.jsonl"
        other.write_text("".join(changed))
        with pytest.raises(RunDirError, match=r"started with the training rows = sha256 \w+, now it is sha256"):
            train(other, base, out=run, **SETTINGS)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    assert before == after


def test_rows_that_moved_but_did_not_change_go_on(made, whole, stopped, tmp_path):
    rows, base = made
    moved = shutil.copy(rows, tmp_path / "elsewhere.jsonl")
    train(moved, base, out=stopped, **SETTINGS)
    assert_same(whole, stopped)


@pytest.mark.parametrize("state", ["whole", "stopped"])
def test_a_run_takes_up_where_its_base_and_data_have_moved_to(made, whole, tmp_path, request, state):
    run, (rows, base) = shutil.copytree(request.getfixturevalue(state), tmp_path / "moved"), made
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace(base, "/gone/base").replace(str(rows), "/gone/rows.jsonl"))
    if state == "whole":
        with pytest.raises(RunDirError, match=r"/gone/base: the base .* new --base"):
            RunDir.open(run)
    with contextlib.suppress(RunFinished):
        train(rows, base, out=run, **SETTINGS)
    assert RunDir.open(run).config() == RunDir(whole).config()
    assert_same(whole, run)


def test_another_base_under_the_same_name_is_refused(made, stopped, tmp_path):
    rows, base = made
    other = shutil.copytree(base, tmp_path / "base")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(RunDirError, match="started with the base = sha256"):
        train(rows, str(other), out=stopped, **SETTINGS)


def test_a_finished_run_over_other_rows_that_nobody_named_is_left_and_the_next_folder_taken(
    made, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    given = {**SETTINGS, "max_steps": 1}
    for seed, name in ((0, "rows-base"), (0, None), (1, "rows-base-2")):
        write_rows(rows, seed=seed)
        if name is None:
            with pytest.raises(RunFinished):
                train(rows, made[1], **given)
        else:
            assert train(rows, made[1], **given).run.path.name == name


def test_restart_begins_anew_and_keeps_the_old_run(made, whole, stopped):
    train(*made, out=stopped, restart=True, **SETTINGS)
    assert_same(whole, stopped)
    aside = stopped.with_name("run.aside-1")
    assert (aside / "checkpoints" / "step-000005").is_dir()


def test_a_restart_that_cannot_begin_leaves_the_old_run_where_it_was(made, stopped, tmp_path):
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    with pytest.raises(DataError):
        train(tmp_path / "bad.jsonl", made[1], out=stopped, restart=True, on_bad="stop", **{**SETTINGS, "holdout": 0})
    assert (stopped / "checkpoints" / "step-000005").is_dir()
    assert (stopped / "rejected.jsonl").is_file()
    assert not stopped.with_name("run.aside-1").exists()


def test_a_second_process_is_refused(made, stopped):
    with RunLock(stopped), pytest.raises(RunDirError, match=rf"process {os.getpid()} on .* is training this run"):
        train(*made, out=stopped, **SETTINGS)


def test_an_adapter_that_cannot_be_written_is_not_the_end(made, whole, tmp_path, monkeypatch):

    def full(*_, **__):
        raise RunDirError("the folder cannot be written (No space left on device)", where="adapter")

    monkeypatch.setattr(Lora, "save", full)
    with pytest.raises(RunDirError, match=r"No space left on device.*resume with: lorafit train"):
        train(*made, out=tmp_path / "run", **SETTINGS)
    monkeypatch.undo()
    train(*made, out=tmp_path / "run", **SETTINGS)
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
def test_a_finished_run_whose_adapter_is_damaged_gets_it_back(made, whole, tmp_path, name, how):
    run = shutil.copytree(whole, tmp_path / "run")
    path = run / "adapter" / name
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if how == "cut" else content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    watch = Watch()
    assert train(*made, out=run, observer=watch, **SETTINGS).tokens == 0
    assert watch.events == [("adapter_damaged", 0), ("resumed", 6)]
    assert path.read_bytes() == content
    assert_same(whole, run)


def test_a_run_that_goes_on_elsewhere_says_that_bits_may_differ(made, stopped):
    path = stopped / "fingerprint.json"
    identity = RunIdentity.read(path)
    edited_identity(path, environment={**identity.environment, "torch": "1.0"})
    watch = Watch()
    train(*made, out=stopped, observer=watch, **SETTINGS)
    assert watch.events == [("resumed", 5), ("environment_changed", 5)]
    assert "torch was 1.0 and is" in (stopped / "events.jsonl").read_text()


def test_checkpoints_that_all_belong_to_another_run_are_refused_and_left_alone(made, stopped):
    edited_identity(stopped / "fingerprint.json", run="0" * 32)
    before = sorted(path.name for path in (stopped / "checkpoints").iterdir())
    for _ in range(2):
        with pytest.raises(RunDirError, match=r"the checkpoints belong to another run.*fingerprint\.json back"):
            train(*made, out=stopped, **SETTINGS)
    assert sorted(path.name for path in (stopped / "checkpoints").iterdir()) == before


def test_one_changed_character_of_the_runs_id_is_refused(made, stopped):
    path = stopped / "fingerprint.json"
    run = RunIdentity.read(path).run
    path.write_text(path.read_text().replace(run, run[:-1] + ("0" if run[-1] != "0" else "1")))
    before = sorted(stopped.rglob("*"))
    with pytest.raises(RunDirError, match="fingerprint has changed since it was written"):
        train(*made, out=stopped, **SETTINGS)
    assert sorted(stopped.rglob("*")) == before


def test_a_run_of_the_release_before_the_seal_goes_on_and_is_sealed(made, whole, stopped):
    path = stopped / "fingerprint.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({key: saved[key] for key in ("run", "fingerprint", "environment")}))
    train(*made, out=stopped, **SETTINGS)
    assert RunIdentity.read(path).is_sealed
    assert_same(whole, stopped)


def edited_identity(path, **values):
    """The fingerprint with these values, sealed again."""
    path.write_text(json.dumps(replace(RunIdentity.read(path), **values).to_dict()))


def edited(run, **values):
    """The run's own run.yaml, with these values."""
    lines = (run / "run.yaml").read_text().splitlines()
    lines = [next((f"{key}: {values[key]}" for key in values if line.startswith(f"{key}:")), line) for line in lines]
    (run / "run.yaml").write_text("\n".join(lines) + "\n")
    return run / "run.yaml"


@pytest.mark.parametrize("checkpoints", ["there", "gone"])
def test_max_tokens_edited_in_run_yaml_is_said(stopped, checkpoints):
    if checkpoints == "gone":
        shutil.rmtree(stopped / "checkpoints")
    watch, step = Watch(), 5 if checkpoints == "there" else 0
    train(edited(stopped, max_length=1024), out=stopped, observer=watch)
    assert watch.events == [("resumed", step), ("environment_changed", step)]
    assert "last bits may differ: micro_tokens was 2048 and is 1024" in (stopped / "events.jsonl").read_text()


def test_more_max_tokens_change_no_bit_and_nothing_is_said(whole, stopped):
    """The micro-batches of the checkpoint are not outgrown."""
    watch = Watch()
    train(edited(stopped, max_length=4096), out=stopped, observer=watch)
    assert watch.events == [("resumed", 5)]
    assert_same(whole, stopped)


def on_a_gpu(max_length, micro_tokens, policy="keep"):
    """What a trainer on a GPU, whose policy was tried, runs in."""
    config = settings(max_length=max_length, memory_policy="recompute")
    return layout_of(config, TunedMemory(micro_tokens), SimpleNamespace(policy=MemoryPolicy.parse(policy, 8)))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (on_a_gpu(2048, 9000), None),
        (on_a_gpu(1024, 9000), "differ: micro_tokens of evaluations was 2048 and is 1024"),
        (on_a_gpu(2048, 4096), "differ: micro_tokens was 9000 and is 4096"),
        (on_a_gpu(2048, 9000, "recompute"), "differ: policy was keep and is recompute_layers=8"),
    ],
)
def test_on_a_gpu_the_tried_policy_counts_and_max_tokens_bears_on_evaluations_alone(stopped, now, said):
    run, events = RunDir(stopped), EventLog()
    identity = RunIdentity.read(run.identity)
    began = {**environment(), "compile": "auto", "deterministic": False, **on_a_gpu(2048, 9000)}
    resume_from(run, replace(identity, environment=began), now, events)
    changed = [event.message for event in events.seen if event.kind == "environment_changed"]
    assert [said in message for message in changed] == ([True] if said else [])


def test_a_run_begun_before_its_layout_was_kept_goes_on_without_a_false_word(made, whole, stopped):
    edited_identity(stopped / "fingerprint.json", environment=environment())
    watch = Watch()
    train(*made, out=stopped, observer=watch, **SETTINGS)
    assert watch.events == [("resumed", 5)]
    assert_same(whole, stopped)


@pytest.mark.parametrize("state", ["whole", "stopped"])
def test_which_rows_were_held_out_is_written_again_where_that_is_gone(made, whole, tmp_path, request, state):
    run = shutil.copytree(request.getfixturevalue(state), tmp_path / "damaged")
    (run / "split.tsv").unlink()
    with contextlib.suppress(RunFinished):
        train(*made, out=run, **SETTINGS)
    assert (run / "split.tsv").read_bytes() == (whole / "split.tsv").read_bytes()


def test_another_holdout_is_called_that_and_not_other_rows(made, whole, stopped):
    for run in (stopped, whole):
        with pytest.raises(
            RunDirError, match=r"started with holdout = 0\.2, now it is 0\.1 \(and the training rows, the "
        ):
            train(*made, out=run, **{**SETTINGS, "holdout": 0.1})


def test_a_run_that_the_minutes_save_ends_in_the_same_bits(made, whole, tmp_path):
    """At every step: metrics, adapter and moments are those of a run that saves by steps alone."""
    train(*made, out=tmp_path / "run", **{**SETTINGS, "save_steps": 1000, "save_minutes": 1e-9, "keep_last": 9})
    assert [path.name[-1] for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == list("123456")
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize(("step", "said"), [(2, "starts over: there is no checkpoint yet"), (4, "resumes from the")])
def test_a_second_signal_names_a_checkpoint_only_where_there_is_one(made, tmp_path, step, said):
    class Twice(Send):
        def on_step_begin(self, args, state, control, **given):
            # a second signal waits for nothing, so not for the thread that writes the checkpoint of step 2 either
            while state.global_step > 2 and not RunDir(tmp_path / "run").has_checkpoint:
                time.sleep(0.01)
            super().on_step_begin(args, state, control, **given)
            super().on_step_begin(args, state, control, **given)

    with pytest.raises(TrainingStopped, match=f"a second signal.*{said}"):
        train(*made, out=tmp_path / "run", callbacks=[Twice(signal.SIGTERM, step)], **SETTINGS)


def with_one_bit_flipped(path):
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])


def test_an_adapter_damaged_after_its_last_checkpoint_is_gone_is_trained_again_and_that_is_said(made, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    with_one_bit_flipped(run / "adapter" / "adapter_model.safetensors")
    watch = Watch()
    train(*made, out=run, observer=watch, **SETTINGS)
    assert watch.events == [("adapter_damaged", 0), ("resumed", 4)]
    assert_same(whole, run)


def test_the_adapter_of_another_run_is_not_taken_for_the_trained_one(made, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    other = train(*made, out=tmp_path / "other", **{**SETTINGS, "max_steps": 1, "lr": 1e-2}).run.adapter
    shutil.rmtree(run / "adapter")
    shutil.copytree(other, run / "adapter")
    watch = Watch()
    train(*made, out=run, observer=watch, **SETTINGS)
    assert watch.events == [("adapter_damaged", 0), ("resumed", 6)]
    assert_same(whole, run)


@pytest.mark.parametrize("content", ["{", "[" * 200_000, '{"run": "x", "fingerprint": {"train_rows": 1}}'])
def test_a_damaged_fingerprint_is_refused_without_a_named_folder_too(made, tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    run = train(*made, **{**SETTINGS, "max_steps": 1}).run
    run.identity.write_text(content)
    with pytest.raises(RunDirError, match=r"cannot be read.*--restart"):
        train(*made, **{**SETTINGS, "max_steps": 1})
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["rows-base"]


def test_what_describes_a_run_is_written_again_when_it_goes_on(made, whole, stopped):
    names = ("plan.json", "findings.json", "template.json", "held-out.jsonl", "base.json")
    for name in names:
        (stopped / name).unlink()
    train(*made, out=stopped, **SETTINGS)
    for name in ("template.json", "held-out.jsonl", "base.json"):
        assert (stopped / name).read_bytes() == (whole / name).read_bytes()
    assert all((stopped / name).is_file() for name in names)


@pytest.mark.parametrize("state", ["whole", "stopped"])
def test_what_other_verbs_rely_on_is_mended_by_the_same_command(made, whole, tmp_path, request, state):
    """Also in a finished run, which is not trained again."""
    run = shutil.copytree(request.getfixturevalue(state), tmp_path / "damaged")
    names = ("template.json", "held-out.jsonl", "base.json")
    for name in names:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 2
        (run / name).write_bytes(content)
    with contextlib.suppress(RunFinished):
        train(*made, out=run, **SETTINGS)
    for name in names:
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    assert not list(run.glob(".*"))


def test_metrics_that_cannot_be_written_are_said(made, whole, stopped):
    (stopped / "metrics.jsonl").unlink()
    (stopped / "metrics.jsonl").mkdir()
    watch = Watch()
    train(*made, out=stopped, observer=watch, **SETTINGS)
    assert watch.events == [("resumed", 5), ("metrics_not_written", 6)]
    name = "adapter/adapter_model.safetensors"
    assert (stopped / name).read_bytes() == (whole / name).read_bytes()


def test_events_of_a_run_that_never_began_are_no_obstacle_and_not_kept(made, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    EventLog(run / "events.jsonl").record("whole_logits", 0, "of the run that never began")
    train(*made, out=run, **{**SETTINGS, "max_steps": 1})
    assert not (run / "events.jsonl").exists()


def test_a_disk_that_is_full_at_the_start_is_one_sentence_and_leaves_no_folder(made, tmp_path, monkeypatch):
    def no_space(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing, "new_own", no_space)
    with pytest.raises(RunDirError, match=r"\.lock: .*No space left on device") as caught:
        train(*made, out=tmp_path / "run", **SETTINGS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
