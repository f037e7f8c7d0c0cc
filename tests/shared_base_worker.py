"""One process of a run over a base that several share; a module of its own, so that spawned processes can import it."""

import os

import torch

from gloo_worker import LENGTHS, Spy, adapted, trained
from little_run import encoded_rows, settings
from little_trainer import training_loop
from lorafit.backbone import load_backbone, load_sharded, require_unchanged
from lorafit.training.distributed import joined


def train_shared(rank, world, base, folder, results, port, quantization, checkpoint=None):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    given = {"examples_per_step": 10, "max_length": 48, "epochs": 8, "lr": 2e-4, "max_grad_norm": 1e9}
    given |= {"modules_to_save": ("embed_tokens", "lm_head")}
    config = settings(base=base, quantization=quantization, save_steps=4, eval_steps=4, **given)
    with joined() as processes:
        if world > 1:
            frozen = load_sharded(config, torch.device("cpu"))
        else:
            frozen = load_backbone(config, device="cpu", dense_budget_bytes=0)
        model, spy = adapted(config, frozen), Spy()
        rows, held_out = encoded_rows(*LENGTHS), encoded_rows(9, 31, 14)
        loop = training_loop(model, config, rows, held_out, folder, callbacks=[spy], processes=processes)
        loop.run(checkpoint)
        require_unchanged(model)
    history = loop.state.log_history
    seen = {name: [entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss")}
    weights = torch.cat([weight.detach().flatten() for weight in trained(model)])
    found = {**seen, "weights": weights, "gradient": spy.gradient, "hashes": spy.hashes}
    torch.save(found, f"{results}/{world}-{rank}.pt")
