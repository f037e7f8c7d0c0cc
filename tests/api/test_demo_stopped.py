"""A stopped demo names the commands for its training and for what comes after it."""

import signal

import pytest

from lorafit.api import demo as module
from lorafit.errors import TrainingStopped


def test_a_stopped_demo_names_every_command_that_is_left(tmp_path, monkeypatch):
    def stop(*_, out, **__):
        raise TrainingStopped(signal.SIGTERM, "SIGTERM after step 282 of 282", where=str(out), fix="resume with: TRAIN")

    monkeypatch.setattr(module, "train", stop)
    run = tmp_path / "run"
    with pytest.raises(TrainingStopped) as found:
        module.demo(out=run)
    assert found.value.exit_code == 143
    assert found.value.fix == f"resume with: TRAIN; the demo's rest is: lorafit eval {run} and lorafit merge {run}"
