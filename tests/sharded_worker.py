"""One process of a full run whose weights are sharded; a module of its own, so that spawned processes can import it."""

import os

import torch

from gloo_worker import LENGTHS
from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.methods import METHODS
from lorafit.methods.full import WeightsSnapshot
from lorafit.methods.full.sharding import shard
from lorafit.training.distributed import joined

SEEN = ("loss", "grad_norm", "eval_loss")


def train_full(rank, world, base, folder, results, port, checkpoint=None, name=None):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    config = settings(
        base=base,
        method="full",
        examples_per_step=10,
        max_length=48,
        epochs=6,
        lr=1e-4,
        max_grad_norm=1.0,
        save_steps=3,
        eval_steps=3,
    )
    with joined() as processes:
        model = METHODS["full"].prepare(load_backbone(config, device="cpu"), config)
        first = dict(WeightsSnapshot.of(model).tensors)
        if world > 1:
            shard(model, torch.device("cpu"), dtype=torch.float32, wide=True)
        held_out = encoded_rows(9, 31, 14)
        loop = training_loop(model, config, encoded_rows(*LENGTHS), held_out, folder, processes=processes)
        loop.run(checkpoint)
        whole = WeightsSnapshot.gathered(model) if world > 1 else WeightsSnapshot.of(model)
    if rank == 0:
        history = loop.state.log_history
        found = {name: [entry[name] for entry in history if name in entry] for name in SEEN}
        torch.save({**found, "weights": dict(whole.tensors), "first": first}, f"{results}/{name or world}.pt")
