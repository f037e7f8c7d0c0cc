"""A run as it happens: on a narrow screen, in a file, and for machines."""

import json
import signal
from types import SimpleNamespace

import pytest

from lorafit.cli.screen import console, watch
from lorafit.cli.screen.watch import ConsoleObserver, JsonObserver
from lorafit.config import resolve
from lorafit.engine import RowMode
from lorafit.hardware import hardware_named
from lorafit.methods.lora import Counts
from lorafit.planning import make_plan
from lorafit.training.logging.progress import StepProgress
from planning_shapes import TINY, facts, shape


def progress(step=7, eval_loss=None, steps=2_400):
    return StepProgress(step, steps, 2.125, 1e-4, 12_345.0, 21 << 30, 3_700.0, eval_loss)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_line_keeps_step_and_both_losses_on_any_screen(width):
    line = watch.Text.from_markup(watch._live_line(progress(eval_loss=2.25), width)).plain
    assert len(line) <= width
    for words in ("step 7/2400", "loss 2.1250", "held-out 2.2500"):
        assert words in line


def test_a_file_gets_a_line_at_once_then_every_half_minute_and_at_each_evaluation(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    shown = ConsoleObserver()
    for step, eval_loss in ((1, None), (2, None), (3, 2.5), (4, 2.5), (5, 2.5)):
        now[0] += 10
        shown.on_step(progress(step, eval_loss))
    now[0] += 30
    shown.on_step(progress(6, 2.5))
    shown.on_step(progress(7, 2.5, steps=7))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2].split("/")[0] for line in lines] == ["1", "3", "6", "7"]
    assert "held-out 2.5000" in lines[1]
    assert not any("held-out" in line for line in (lines[0], *lines[2:])), "no stale value"


@pytest.mark.parametrize(
    ("settings", "stage", "words"),
    [
        ({"method": "lora"}, "quantize", "frozen"),
        ({"method": "lora", "quantization": "none"}, "load", "frozen"),
        ({"method": "full"}, "load", "every weight trains"),
    ],
)
def test_a_base_is_called_quantized_and_frozen_where_it_is(settings, stage, words, capsys):
    """A large adapter is not taken for every weight, nor a 16-bit base for a quantized one."""
    resolved = resolve({}, settings)
    shown = ConsoleObserver()
    shown.on_plan(make_plan(resolved, facts(), shape(TINY), hardware_named("H100")), resolved)
    shown.on_model(Counts(trainable=8, total=10), "base", RowMode())
    [line] = [line for line in capsys.readouterr().out.splitlines() if f"base, {words};" in line]
    assert line.split()[0] == stage


def test_machines_get_one_object_a_line(capsys):
    JsonObserver().on_step(progress(eval_loss=float("nan")))
    told = capsys.readouterr()
    assert told.out == ""
    [line] = told.err.splitlines()
    assert json.loads(line) | {"event": "step", "step": 7, "eval_loss": None} == json.loads(line)


def test_paths_below_the_current_folder_are_shown_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert console.near(f"{tmp_path}/rows.jsonl:3") == "rows.jsonl:3"
    assert console.typed("lorafit", "train", f"{tmp_path}/my rows.jsonl") == "lorafit train 'my rows.jsonl'"


def test_a_second_ctrl_c_is_offered_to_whom_pressed_it_once(capfd):
    for number in (signal.SIGTERM, signal.SIGINT):
        ConsoleObserver().on_stopping(number)
    assert capfd.readouterr().err.count("press Ctrl-C again to end at once") == 1
