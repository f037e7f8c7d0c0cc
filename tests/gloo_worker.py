"""One process of a distributed run on CPUs; a module of its own, so that spawned processes can import it."""

import os

import torch

from little_run import encoded_rows, settings
from lorafit.backbone import load_backbone
from lorafit.methods.lora import attach
from lorafit.training import LorafitTrainer

LENGTHS = (23, 5, 40, 12, 31, 8, 17, 29, 3, 44)


def adapted(config):
    model = attach(load_backbone(config, device="cpu"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:  # with B at zero, A would have no gradient to compare
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def train_in_a_process(rank, world, base, folder, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    config = settings(base=base, examples_per_step=10, max_length=48, max_steps=2, lr=1e-2, max_grad_norm=1e9)
    model = adapted(config)
    trainer = LorafitTrainer(model, config, encoded_rows(*LENGTHS), None, folder)
    assert trainer.args.world_size == world
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])
    torch.save({"losses": losses, "weights": weights}, f"{results}/{world}-{rank}.pt")
