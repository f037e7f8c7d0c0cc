"""`lorafit train --gpus`: killed, stopped, hung and resumed, a run ends in the bits of an uninterrupted one."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from little_run import write_rows
from lorafit.api.plan import plan
from lorafit.api.processes.chosen_gpus import chosen_gpus
from lorafit.api.processes.launch import _exit_code, processes_to_start
from lorafit.api.settings import settle
from lorafit.demo import BASE
from lorafit.errors import LorafitError, ProcessLost, TrainingError, TrainingStopped, UsageError
from lorafit.hardware import Hardware, hardware_named
from lorafit.planning import Decision
from lorafit.runs import RunDir, RunFingerprint, RunIdentity
from lorafit.runs.identity import PROCESSES
from lorafit.runs.launched import FOLDER, leave_error, left_error
from several_worker import Harm, launched

pytestmark = pytest.mark.processes


def kinds_of(run: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_that_was_killed_and_stopped_ends_in_the_same_bits(tmp_path: Path) -> None:
    """One gradient of process 1 is NaN: the step is withheld in both. Weights are compared after every step."""
    data, run, whole = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "run", tmp_path / "whole"
    uninterrupted = launched(data, whole)
    assert (uninterrupted.code, uninterrupted.errors) == (0, "")
    assert kinds_of(whole) == ["non_finite"]

    killed = launched(data, run, Harm(rank=1, step=3, signal=signal.SIGKILL))
    assert killed.code == 1
    assert killed.seconds < 30
    assert killed.sentences == [
        "error: process 1 was killed (SIGKILL), and the run ended with it; "
        "run the same command again, which resumes from the newest checkpoint"
    ]
    stopped = launched(data, run, Harm(rank=0, step=4, signal=signal.SIGTERM, to_launcher=True))
    assert (stopped.code, stopped.seconds < 60) == (143, True)
    assert f"stopped: {run}: SIGTERM after step 4 of 8; the newest checkpoint is step-000004" in stopped.errors
    stopped = launched(data, run, Harm(rank=1, step=5, signal=signal.SIGTERM))
    assert stopped.code == 143
    assert f"stopped: {run}: SIGTERM after step 5 of 8; the newest checkpoint is step-000005" in stopped.errors
    hung = launched(data, run, Harm(rank=1, step=6, hang=True, timeout_s=3))
    assert hung.code == 1
    assert hung.sentences[-1].startswith("error: another process of this run has not answered for 0.05 minutes; run")

    assert launched(data, run).code == 0
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert kinds_of(run) == ["resumed", "non_finite", "resumed", "resumed", "resumed"]
    again = launched(data, run)
    assert (again.code, len(again.sentences)) == (0, 1)
    assert again.sentences[0].startswith("finished: ")


def failures(**given: tuple[int, int]) -> dict[int, ProcessFailure]:
    """Failures by rank from exit codes and seconds, as `r0=(1, 0)`."""
    found = {}
    for name, (code, second) in given.items():
        found[int(name[1:])] = failure = ProcessFailure(0, 1, code, "none")
        failure.timestamp = 1000 + second
    return found


def test_the_exit_code_tells_stops_from_kills_and_errors() -> None:
    assert _exit_code(failures(r1=(143, 0))) == 143
    assert _exit_code(failures(r1=(2, 0))) == 2
    assert _exit_code(failures(r0=(1, 0), r1=(-9, 31))) == 1, "the launcher itself killed process 1, which hung"
    with pytest.raises(TrainingError, match=r"process 1 was killed \(SIGKILL\)"):
        _exit_code(failures(r0=(1, 1), r1=(-9, 0)))


def test_the_process_with_a_trouble_of_its_own_explains_the_end(tmp_path: Path, monkeypatch) -> None:
    assert left_error(tmp_path) is None
    assert not leave_error(UsageError("no launcher reads this"))
    monkeypatch.setenv(FOLDER, str(tmp_path))
    left: list[tuple[int, LorafitError]] = [
        (0, ProcessLost("another process has ended")),
        (2, TrainingError("the disk is full", where="/run", fix="free some")),
    ]
    for rank, error in left:
        monkeypatch.setenv("RANK", str(rank))
        assert leave_error(error)
    found = left_error(tmp_path)
    assert found is not None
    assert found.sentence == "/run: process 2: the disk is full; free some"
    monkeypatch.setenv("RANK", "0")
    leave_error(TrainingStopped(signal.SIGTERM, "SIGTERM after step 3"))
    found = left_error(tmp_path)
    assert found is not None
    assert (found.label, found.exit_code, found.what) == ("stopped", 143, "SIGTERM after step 3")


def test_gpus_that_are_not_there_are_refused_with_a_way_to_train(monkeypatch) -> None:
    two, every, planned = (Decision("gpus", *rest) for rest in ((2, "", "flag"), ("all", "", "flag"), (2, "")))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(UsageError, match="no GPU that torch can use; leave gpus out"):
        processes_to_start(two)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UsageError, match="1 GPUs, not 2"):
        processes_to_start(two)
    assert processes_to_start(planned) == 1, "nobody asked for two"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert [processes_to_start(one) for one in (two, every, planned)] == [2, 4, 2]


def test_settings_that_name_no_gpus_leave_them_to_the_run_or_its_plan(tmp_path: Path, monkeypatch) -> None:
    data, two = [write_rows(tmp_path / "rows.jsonl", 40)], replace(hardware_named("2 x H200"), idle_count=2)
    given = {"base": str(BASE), "out": str(tmp_path / "run")}

    def chosen(hardware: Hardware = two, **settings: Any) -> tuple[Any, str] | None:
        decision = chosen_gpus(data, {**given, **settings}, detect=lambda config: hardware)
        return decision and (decision.value, decision.reason)

    assert chosen(hardware_named("H200")) is None
    assert chosen(gpus="all") == ("all", "set by you")
    small = chosen()
    assert small is not None and small[0] == 1 and "by the plan" in small[1], "a run of seconds"
    monkeypatch.setattr("lorafit.api.plan.hardware_for", lambda config: two)
    planned = plan(data, **given)
    assert small in [(one.value, one.reason) for one in planned.plan.decisions]
    assert planned.resolved.config.gpus == 1 and f"gpus: 1  # plan: {small[1]}" in planned.recipe
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    run.write_json(run.identity, RunIdentity("a", RunFingerprint("", "", "", ""), {PROCESSES: 2}).to_dict())
    resolved = settle(data, given)
    run.write_config(resolved.config, {key: source.value for key, source in resolved.sources.items()})
    assert chosen() == (2, "the run began on 2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen(gpus=2) is None, "a process of a launcher starts no others"
