"""train on a GPU: whatever the policy, the same losses, and the run says what it did."""

import json

import pytest

from little_run import write_rows
from lorafit.api.train import train
from tiny_models import save_base

pytestmark = pytest.mark.gpu

LAYERS = 4
POLICIES = [
    "keep",
    "recompute",
    "recompute_layers=2,recompute_mlp_layers=1,offloaded_layers=4,host_embeddings=on",
    "recompute,offloaded_layers=4,host_embeddings=on,micro_tokens=64",
    "dequantized_layers=2",
    "weights=dense",
    "keep,cuda_graph_max_tokens=1024",
    "recompute_mlp_layers=4,cuda_graph_max_tokens=1024",
    "auto",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("on-GPU")
    save_base(place / "base", hidden_size=256, num_hidden_layers=LAYERS, max_position_embeddings=1024)
    return place, write_rows(place / "rows.jsonl", 60)


def losses(place, name, **given):
    folder, data = place
    sizes = {"rank": 4, "max_length": 1024, "examples_per_step": 8, "max_steps": 3, "holdout": 0}
    settings = {"lr": 1e-2, "dropout": 0.0, "quantization": "nf4", **sizes, **given}
    done = train(data, str(folder / "base"), out=folder / name, **settings)
    lines = [json.loads(line) for line in done.run.metrics.read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], json.loads(done.run.engine.read_text())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_losses_are_those_of_eager_layers_that_keep_everything(place, policy, request):
    wanted, _ = losses(place, f"plain-{request.node.name}", memory_policy="keep", compile="off")
    found, engine = losses(place, f"run-{request.node.name}", memory_policy=policy)
    assert found == pytest.approx(wanted, rel=5e-3)  # bf16; kernels are fused differently
    assert engine["notes"] == []
    if policy == "auto":  # so small a model waits for the processor
        assert engine["policy"].startswith("dequantized_layers=") and ",cuda_graph_max_tokens=" in engine["policy"]
