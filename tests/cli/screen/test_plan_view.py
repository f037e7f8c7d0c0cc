import pytest

from lorafit.cli.plan import show_plan
from lorafit.config import resolve
from lorafit.hardware import hardware_named
from lorafit.hardware.device import GIB
from lorafit.memory import DataStats
from lorafit.planning import make_plan
from planning_shapes import shape


@pytest.fixture
def shown(capsys):
    def show(gib):
        rows = DataStats(640, 640 * 500, 640 * 500, 2048, 500.0)
        gpu = hardware_named("H200").with_memory(gib * GIB)
        show_plan(make_plan(resolve({}, {"max_length": 8192}), rows, shape(), gpu))
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    return show


def test_the_plan_says_what_the_policy_does_and_what_the_host_holds(shown):
    text = shown(8)
    assert "layers recompute their feed-forward" in text
    assert "tok/s predicted" in text
    assert "host memory" in text


def test_what_stays_on_the_gpu_needs_no_host_memory(shown):
    text = shown(100)
    assert "every activation stays on the device" in text
    assert "host memory" not in text
