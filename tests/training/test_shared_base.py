"""Adapters over a base whose layers several processes share: the run of one process, and its checkpoints."""

import pytest
import torch
from safetensors.torch import load_file

from fork_server import run_each
from little_run import write_rows
from lorafit.api.load import load
from several_worker import Harm, launched
from shared_base_worker import train_shared
from tiny_models import save_base

pytestmark = pytest.mark.processes

QUESTION = [{"role": "user", "content": "Route this ticket to a queue.\nThe courier lost my red lamp."}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(save_base(tmp_path_factory.mktemp("base"), num_hidden_layers=3))


def ended(world, base, folder, port, *more):
    """What each of `world` processes ends in after 8 steps."""
    folder.mkdir()
    given = (world, base, folder / "run", str(folder), port, *more)
    run_each(train_shared, [(rank, *given) for rank in range(world)])
    return [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "quantization"), [(2, "nf4"), (3, "none")])
def test_a_shared_base_trains_as_a_whole_one_does(base, tmp_path, world, quantization):
    """Two and three processes over the three layers of packed and of 16-bit bases; a resumed run has the same bits."""
    (alone,) = ended(1, base, tmp_path / "1", 29551, quantization)
    first, *others = ended(world, base, tmp_path / "several", 29550 + world, quantization)
    assert len(first["hashes"]) == 8 and len(first["eval_loss"]) == 2
    assert all(other["hashes"] == first["hashes"] for other in others)
    for name in ("loss", "eval_loss"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5)
    for name in ("gradient", "weights"):
        assert float((first[name] - alone[name]).norm() / alone[name].norm()) < 1e-5
    middle = tmp_path / "several" / "run" / "step-000004"
    again, *_ = ended(world, base, tmp_path / "again", 29560 + world, quantization, middle)
    assert torch.equal(again["weights"], first["weights"])


@pytest.mark.slow
def test_a_command_over_a_shared_base_ends_as_over_whole_ones(tmp_path):
    """Layers are recomputed, and a gradient of process 1 is NaN once: the step is withheld in both."""
    data = write_rows(tmp_path / "rows.jsonl", 40)
    runs = {}
    for shard_base in ("on", "off"):
        runs[shard_base] = tmp_path / shard_base
        given = ("--set", f"shard_base={shard_base}", "--set", "memory_policy=recompute")
        done = launched(data, runs[shard_base], Harm(), *given, "--set", "quantization=nf4")
        assert done.code == 0, done.errors
    weights = {name: torch.cat([one.flatten() for one in _adapter(run).values()]) for name, run in runs.items()}
    assert float((weights["on"] - weights["off"]).norm() / weights["off"].norm()) < 1e-5
    assert load(runs["on"]).answer(QUESTION, max_new_tokens=8)


def _adapter(run):
    return load_file(run / "adapter" / "adapter_model.safetensors")
