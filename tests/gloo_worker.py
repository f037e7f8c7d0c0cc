"""One process of a distributed run on CPUs; a module of its own, so that spawned processes can import it."""

import hashlib
import os

import torch
from transformers import TrainerCallback

from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone
from lorafit.methods.lora import attach

LENGTHS = (23, 5, 40, 12, 31, 8, 17, 29, 3, 44)


def adapted(config, base=None):
    model = attach(base or load_backbone(config, device="cpu"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:  # with B at zero, A would have no gradient to compare
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


class Spy(TrainerCallback):
    """Keeps the first step's gradient, and a hash of the trained weights after every step."""

    def __init__(self):
        self.hashes, self.gradient = [], None

    def on_pre_optimizer_step(self, args, state, control, **given):
        if self.gradient is None:
            self.gradient = torch.cat([weight.grad.flatten() for weight in trained(given["model"])])

    def on_step_end(self, args, state, control, **given):
        digest = hashlib.sha256()
        for weight in trained(given["model"]):
            digest.update(weight.detach().numpy().tobytes())
        self.hashes.append(digest.hexdigest())


def trained(model):
    return [weight for weight in model.parameters() if weight.requires_grad]


def train_in_a_process(rank, world, base, folder, results, short_rank=None):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29517", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    variant = {"dora": True, "loraplus_lr_ratio": 4.0, "modules_to_save": ("embed_tokens", "lm_head")}
    config = settings(base=base, examples_per_step=10, max_length=48, epochs=8, lr=2e-4, max_grad_norm=1e9, **variant)
    model = adapted(config)
    if rank == short_rank:
        _run_out_of_memory_once(model)
    spy = Spy()
    trainer = training_loop(model, config, encoded_rows(*LENGTHS), None, folder, callbacks=[spy])
    assert trainer.processes.world == world
    trainer.run()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = torch.cat([weight.detach().flatten() for weight in model.parameters() if weight.requires_grad])
    torch.save(
        {"losses": losses, "weights": weights, "micro_tokens": trainer.steps.layout.micro_tokens, "hashes": spy.hashes}
        | {"gradient": spy.gradient},
        f"{results}/{world}-{rank}.pt",
    )


def _run_out_of_memory_once(model):
    left = [True]

    def run(*_):
        if left and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.get_base_model().model.layers[-1].register_forward_hook(run)
