"""RunConfig → transformers.TrainingArguments."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from lorafit.config import RunConfig
from lorafit.training.trainer_library import TrainingArguments

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def total_steps(config: RunConfig, epoch_steps: int) -> int:
    """Optimizer steps of the whole run."""
    planned = math.ceil(config.epochs * epoch_steps)
    return min(planned, config.max_steps) if config.max_steps else planned


def training_arguments(
    config: RunConfig, folder: Path, epoch_steps: int, dtype: torch.dtype, *, evaluates: bool = True
) -> TrainingArguments:
    """Arguments of the Trainer for `config`; `dtype` is the compute dtype of the loaded backbone.

    One Trainer batch is one whole step, so batch size and accumulation are both 1 there. fp16 and the 8-bit
    optimizers are asked for only where CUDA is.
    """
    steps = total_steps(config, epoch_steps)
    cuda = torch.cuda.is_available()
    optimizer = "adamw" if config.optimizer == "auto" else config.optimizer  # the plan knows when moments are too large
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=config.lr,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=min(math.ceil(config.warmup * steps), steps - 1),  # the first step of a warm-up has lr 0
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[optimizer],
        bf16=cuda and dtype == torch.bfloat16,
        fp16=cuda and dtype == torch.float16,
        use_cpu=not cuda,
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN loss must be seen, not smoothed away
        **(_intervals("eval", config.eval_steps, epoch_steps) if evaluates else {"eval_strategy": "no"}),
        **_intervals("save", config.save_steps, epoch_steps),
        save_total_limit=config.keep_last,
        report_to=list(config.report_to) or "none",
        run_name=folder.parent.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0,
        **_checkpointing(config),
    )


def _intervals(verb: str, every: int | None, epoch_steps: int) -> dict[str, Any]:
    # once an epoch, counted in steps: the Trainer's own "epoch" strategy would miss a run that ends mid-epoch
    return {f"{verb}_strategy": "steps", f"{verb}_steps": every or epoch_steps}


def without_checkpointing(arguments: TrainingArguments) -> None:
    """Tell the Trainer to leave activations alone: the engine's layers have them."""
    setattr(arguments, _checkpointing_name(), False)


def _checkpointing(config: RunConfig) -> dict[str, Any]:
    policy = config.memory_policy
    on = policy == "recompute" or (policy == "auto" and torch.cuda.is_available())
    name = _checkpointing_name()
    return {name: on, f"{name}_kwargs": {"use_reentrant": False}}


def _checkpointing_name() -> str:
    # transformers renamed it after 5.17; the old name warns in newer releases and is gone in 6
    known = {field.name for field in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
