"""One process of a full run whose weights are sharded; a module of its own, so that spawned processes can import it."""

import os
from types import SimpleNamespace

import torch
from safetensors.torch import save_file
from torch import distributed as dist

from gloo_worker import LENGTHS
from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.errors import RunDirError
from lorafit.methods import METHODS
from lorafit.methods.full import WeightsSnapshot
from lorafit.methods.full.sharded_folder import ShardsSnapshot, write_shards
from lorafit.methods.full.sharding import own_shard, shard
from lorafit.runs import ADAPTER
from lorafit.training.checkpoints.moments import SHARDED, moments_in
from lorafit.training.checkpoints.snapshot import OPTIMIZER, optimizer_state
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


def move_fp32_copies(base, folder, port):
    """Take fp32 copies of bf16 weights, and their moments, from whole weights to shards and back."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    config = settings(base=base, method="full", compute="bf16")
    full, kind = METHODS["full"], torch.optim.AdamW

    def loop_of(model):
        groups = [{"params": full.trainable(model), "lr": 1e-3}]
        return SimpleNamespace(model=model, optimizer=full.optimizer(kind, groups, {"lr": 1e-3}), config=config)

    def made():
        return full.prepare(load_backbone(config, device="cpu"), config)

    whole = loop_of(made())
    for weight in full.trainable(whole.model):
        weight.grad = torch.full_like(weight, 0.01)
    whole.optimizer.step()
    dist.init_process_group("gloo")
    shards = loop_of(shard(made(), torch.device("cpu"), dtype=torch.bfloat16, wide=True))
    back, moments = loop_of(made()), optimizer_state(whole.optimizer)[0]

    one, several = folder / "one", folder / "several"
    for place in (one, several):
        place.mkdir()
    WeightsSnapshot.of(whole.model).write(one / ADAPTER)
    save_file(moments, one / OPTIMIZER)
    full.restore(shards.model, one / ADAPTER)
    taken = moments_in(shards, one)
    for weight, master in zip(full.trainable(shards.model), whole.optimizer.masters.values(), strict=True):
        assert master.dtype is torch.float32 and torch.equal(own_shard(weight), master)

    layout = shards.model.shard_layout
    ShardsSnapshot.of(shards.model).write(several / ADAPTER)
    write_shards(layout.named(taken, full.trainable(shards.model)), several / SHARDED, layout.group)
    returned = moments_in(back, several)
    assert returned.keys() == moments.keys() and any(name.endswith(".master") for name in moments)
    for name, tensor in moments.items():
        assert torch.equal(returned[name], tensor), name
    moments["0.state1"] = torch.zeros(whole.optimizer.param_groups[0]["params"][0].shape, dtype=torch.uint8)
    save_file(moments, one / OPTIMIZER)
    try:
        moments_in(shards, one)
        raise AssertionError("8-bit moments moved")
    except RunDirError as error:
        assert "the 8-bit moments belong to one GPU; resume with --gpus 1" in error.sentence
