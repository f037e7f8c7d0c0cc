"""The console: a run outlives whoever reads its output."""

import errno
import os
import sys
from pathlib import Path

import pytest

from little_run import write_rows
from lorafit.cli import main
from lorafit.cli.console import say, show_error, steady
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
    given = [data, "--base", BASE, "--out", out, "--set", "max_steps=2", "--set", "max_tokens=128"]
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, given)])
    assert not ended.value.code
    assert (out / "adapter").is_dir()


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
