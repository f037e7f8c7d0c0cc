"""A full run whose weights are sharded over processes: the run of one process, and its checkpoints."""

import json
import signal

import pytest
import torch

from fork_server import run_each
from little_run import write_rows
from lorafit.api.load import load
from lorafit.api.merge import merge
from lorafit.errors import UsageError
from several_worker import Harm, launched
from sharded_worker import move_fp32_copies, train_full
from tiny_models import save_base

pytestmark = pytest.mark.processes

FULL = ("--set", "method=full", "--set", "lr=1e-3", "--set", "ignore=P")
QUESTION = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sharded")
    save_base(made / "base")
    return made


def ended(folder, world, port, *more):
    """What `world` processes end in after 6 steps."""
    given = (world, str(folder / "base"), folder / f"run-{port}", str(folder), port, *more)
    run_each(train_full, [(rank, *given) for rank in range(world)])
    return torch.load(folder / f"{more[-1] if more else world}.pt")


@pytest.fixture(scope="module")
def ends(folder):
    """The ends of 1, 2 and 3 processes, and of runs that go on from the middle, as many as before or others."""
    found = {world: ended(folder, world, 29530 + world) for world in (1, 2, 3)}
    of_one, of_two = (folder / f"run-2953{world}" / "step-000003" for world in (1, 2))
    resumed = [("2 resumed", 2, of_two), ("1 after 2", 1, of_two), ("2 after 1", 2, of_one)]
    return found | {name: ended(folder, world, 29542 + world, middle, name) for name, world, middle in resumed}


def distance(one, other):
    return sum(float((tensor - other[name]).norm()) ** 2 for name, tensor in one.items()) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("run", [2, 3])
def test_shards_train_as_one_process_does(ends, run):
    """Shares of a step differ in micro-batches, and the third process has none of most steps."""
    alone, several = ends[1], ends[run]
    assert len(several["loss"]) == 6
    for name in ("loss", "grad_norm", "eval_loss"):
        assert several[name] == pytest.approx(alone[name], rel=1e-5), name
    moved = distance(alone["weights"], alone["first"])
    assert distance(several["weights"], alone["weights"]) < 1e-4 * moved


@pytest.mark.slow
def test_a_resumed_sharded_run_ends_in_the_same_bits(ends):
    for name, whole in ends[2]["weights"].items():
        assert torch.equal(ends["2 resumed"]["weights"][name], whole), name
    assert ends["2 resumed"]["loss"] == ends[2]["loss"]


@pytest.mark.slow
def test_one_process_takes_up_the_run_of_several_and_they_the_run_of_one(ends):
    moved = distance(ends[1]["weights"], ends[1]["first"])
    for run in ("1 after 2", "2 after 1"):
        assert ends[run]["loss"] == pytest.approx(ends[1]["loss"], rel=1e-5), run
        assert distance(ends[run]["weights"], ends[1]["weights"]) < 1e-4 * moved, run


def test_fp32_copies_of_16_bit_weights_become_shards_and_copies_again(folder, tmp_path):
    # a port of its own: test_shared_base.py may run at the same time
    run_each(move_fp32_copies, [(str(folder / "base"), tmp_path, 29571)])


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_with_another_number_of_processes_and_is_exported(tmp_path):
    """One gradient of process 1 is NaN: the step is withheld in both."""
    data, run = write_rows(tmp_path / "rows.jsonl", 40), tmp_path / "run"
    killed = launched(data, run, Harm(rank=1, step=5, signal=signal.SIGKILL), *FULL)
    assert killed.code == 1 and killed.seconds < 60
    assert "process 1 was killed (SIGKILL)" in killed.errors
    assert launched(data, run, Harm(spoiled_step=0), *FULL, world=3).code == 0
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    told = {event["kind"]: event["message"] for event in events}
    # the kill may come before process 0 has heard that the other one has written its part
    assert [kind for kind in told if kind != "checkpoint_failed"] == ["non_finite", "resumed", "environment_changed"]
    assert "the number of processes was 2 and is 3" in told["environment_changed"]
    assert load(run).answer(QUESTION, max_new_tokens=8)
    assert merge(run).passed
    with pytest.raises(UsageError, match="checkpoint 4 holds the shards of several GPUs, and no whole model"):
        load(run, checkpoint="4")
