"""The console: a run outlives whoever reads its output."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from little_run import write_rows
from lorafit.cli import main
from lorafit.cli.screen import console
from lorafit.cli.screen.console import say, show_error, show_next, show_settings, steady
from lorafit.demo import BASE


@pytest.fixture(params=["full disk", "gone reader"])
def refusing(request, monkeypatch):
    """stdout and stderr that take nothing."""
    if request.param == "full disk":
        if not Path("/dev/full").exists():
            pytest.skip("needs /dev/full")
        stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", buffering=1)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_lines_that_cannot_be_written_are_dropped_and_nothing_is_left_to_fail_at_the_end(refusing):
    with steady():
        say("a line")
        say("another")
    show_error("said to nobody")
    refusing.close()


def test_a_run_trains_to_its_end_though_its_output_goes_nowhere(refusing, tmp_path):
    data, out = write_rows(tmp_path / "rows.jsonl"), tmp_path / "run"
    given = [data, "--base", BASE, "--out", out, "--set", "max_steps=2", "--set", "max_length=128"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, given)])
    assert not ended.value.code
    assert (out / "adapter").is_dir()


@pytest.mark.parametrize(
    ("rows", "flags", "code"),
    [("", [], 0), ("", ["--json"], 0), ("{broken\n", [], 1), ("{broken\n", ["--json"], 1)],
)
def test_check_whose_reader_went_away_ends_quietly_with_the_verdict(tmp_path, rows, flags, code):
    data = write_rows(tmp_path / "rows.jsonl", 60)
    with data.open("a") as file:
        file.write(rows)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lorafit", "check", str(data), *flags]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_check_on_a_full_disk_is_an_error(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    command = [sys.executable, "-m", "lorafit", "check", str(write_rows(tmp_path / "rows.jsonl"))]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (1, "error: No space left on device; check the disk and the path\n")


def test_help_whose_reader_went_away_ends_quietly(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(SystemExit) as ended:
            main(["--help"])
        assert sys.stdout is stream
    assert not ended.value.code


def test_output_comes_back_once_the_disk_has_room_again(monkeypatch):
    class Filling:
        full, seen = True, ""

        def write(self, text):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.seen += text
            return len(text)

        def flush(self):
            pass

    stream = Filling()
    monkeypatch.setattr(sys, "stdout", stream)
    with steady():
        say("lost")
        stream.full = False
        say("kept")
    assert stream.seen == "kept\n"


def test_a_next_command_keeps_its_purpose_beside_it_or_on_a_line_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(console.PEOPLE, "width", 60)
    show_next(("lorafit merge runs/a", "one model to serve"), ("lorafit chat " + 40 * "a", "talk to it"))
    short, long, purpose = capsys.readouterr().out.splitlines()
    assert short == "next      lorafit merge runs/a  one model to serve"
    assert (long, purpose) == (f"          lorafit chat {40 * 'a'}", "            talk to it")


def test_a_recipes_line_that_repeats_a_default_is_shown_as_one(capsys):
    show_settings([("rank", 8, "recipe"), ("seed", 0, "recipe"), ("epochs", 9.0, "flag")])
    rank, epochs, defaults = capsys.readouterr().out.splitlines()
    assert rank.split() == ["rank", "8", "recipe"] and epochs.split() == ["epochs", "9.0", "flag"]
    assert defaults.strip() == "default: seed 0"


def test_an_error_shows_a_name_with_a_terminal_code_and_works_in_a_removed_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    show_error("a\x1b[31mb: no such folder; pass ünï🔥")
    assert capsys.readouterr().err == "error: a\\x1b[31mb: no such folder; pass ünï🔥\n"
