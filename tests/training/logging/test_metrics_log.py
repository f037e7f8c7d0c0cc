"""metrics.jsonl: each step once, the same bytes for the same run, whatever the disk and the killer do."""

import json
from types import SimpleNamespace

from lorafit.training import MetricsLog
from lorafit.training.logging.run_logs import line_of

HISTORY = [
    {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 0.5, "step": 1},
    {"eval_loss": 2.25, "epoch": 0.5, "step": 1},
    {"loss": float("nan"), "grad_norm": float("inf"), "learning_rate": 0.1, "epoch": 1.0, "step": 2},
    {"train_runtime": 3.0, "epoch": 1.0, "step": 2},
]


def log(metrics, entry):
    history = HISTORY[: HISTORY.index(entry) + 1]
    state = SimpleNamespace(
        is_world_process_zero=True, global_step=entry["step"], epoch=entry["epoch"], log_history=history
    )
    logs = {key: value for key, value in entry.items() if key not in ("step", "epoch")}
    metrics.on_log(None, state, None, logs=logs)


def test_steps_and_evaluations_are_lines_and_what_is_not_finite_is_null(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.begin([])
    for entry in HISTORY:
        log(metrics, entry)
    lines = [json.loads(line) for line in metrics.file.path.read_text().splitlines()]
    assert lines == [
        {"step": 1, "epoch": 0.5, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 0.1},
        {"step": 1, "epoch": 0.5, "eval_loss": 2.25},
        {"step": 2, "epoch": 1.0, "loss": None, "grad_norm": None, "learning_rate": 0.1},
    ]


def test_a_resumed_run_has_each_step_once_whatever_was_added_before_the_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line_of(entry) or "" for entry in HISTORY) + '{"step": 3, "lo')
    metrics = MetricsLog(path)
    metrics.begin(HISTORY[:2])
    assert path.read_text() == line_of(HISTORY[0]) + line_of(HISTORY[1])
    log(metrics, HISTORY[2])
    whole = MetricsLog(tmp_path / "whole.jsonl")
    whole.begin(HISTORY)
    assert path.read_bytes() == whole.file.path.read_bytes()


def test_a_disk_that_refuses_a_line_gets_it_later_and_in_order(tmp_path):
    metrics = MetricsLog(tmp_path / "gone" / "metrics.jsonl")
    metrics.begin(HISTORY[:1])
    log(metrics, HISTORY[1])
    assert metrics.flush() is False
    metrics.file.path.parent.mkdir()
    log(metrics, HISTORY[2])
    assert metrics.file.path.read_text() == "".join(line_of(entry) for entry in HISTORY[:3])


def test_what_was_half_written_when_the_disk_filled_is_written_again(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.begin(HISTORY[:1])
    with metrics.file.path.open("a") as file:
        file.write('{"step": 1, "ev')
    log(metrics, HISTORY[1])
    assert metrics.file.path.read_text() == line_of(HISTORY[0]) + line_of(HISTORY[1])


def test_times_are_kept_apart(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.begin([])
    log(metrics, HISTORY[0])
    assert "_s" not in metrics.file.path.read_text()
    assert json.loads(metrics.timings.read_text())["step"] == 1


def test_a_file_that_somebody_removes_is_written_again_from_the_history(tmp_path):
    metrics = MetricsLog(tmp_path / "metrics.jsonl")
    metrics.begin(HISTORY[:1])
    metrics.file.path.unlink()
    log(metrics, HISTORY[1])
    assert metrics.file.path.read_text() == line_of(HISTORY[0]) + line_of(HISTORY[1])
