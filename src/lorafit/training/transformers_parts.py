"""transformers_parts: arguments, optimizer, learning-rate schedule, callbacks and trackers from transformers."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.backbone import redirect_library_logs
from lorafit.config import RunConfig
from lorafit.errors import UsageError
from lorafit.methods import Method
from lorafit.training.checkpoints.snapshot import TRAINER_STATE

with redirect_library_logs():  # transformers imports bitsandbytes here, which warns on some CPUs
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
        get_scheduler,
        set_seed,
    )
    from transformers.integrations import (
        get_available_reporting_integrations,
        get_reporting_integration_callbacks,
    )
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

__all__ = [
    "CallbackHandler",
    "DefaultFlowCallback",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "build_lr_scheduler",
    "build_optimizer",
    "get_reporting_integration_callbacks",
    "require_trackers",
    "set_seed",
    "training_arguments",
    "withhold_unless_finite",
]

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "paged_adamw_8bit": "paged_adamw_8bit"}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
TRACKER_PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}
"""Tracker -> its package, where that has another name."""


def training_arguments(
    config: RunConfig, folder: Path, epoch_steps: int, dtype: torch.dtype, *, evaluates: bool = True
) -> TrainingArguments:
    """Return transformers' arguments for `config`.

    `dtype` is the compute dtype of the loaded backbone. Callbacks and trackers read the arguments, optimizer and
    schedule are built from them, and they start the process group if there is one. fp16 and the 8-bit optimizers need
    CUDA.
    """
    steps = config.total_steps(epoch_steps)
    cuda = torch.cuda.is_available()
    # the plan has chosen 8 bits if moments are too large
    optimizer = "adamw" if config.optimizer == "auto" else config.optimizer
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=1,  # transformers' batch is a whole step here
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
        **(_intervals("eval", config.eval_steps, epoch_steps) if evaluates else {"eval_strategy": "no"}),
        **_intervals("save", config.save_steps, epoch_steps),
        save_total_limit=config.keep_last,
        report_to=list(config.report_to) or "none",
        run_name=folder.parent.name,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )


def build_optimizer(
    trained: Sequence[nn.Parameter], arguments: TrainingArguments, model: nn.Module, method: Method, config: RunConfig
) -> Any:
    """Return the optimizer over `trained`. Only matrices have weight decay, not norms and biases.

    The first groups have the learning rate of `config`; groups whose rate the method multiplies follow.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    factors = [method.learning_rate_factor(names.get(id(weight), ""), config) for weight in trained]
    groups: list[dict[str, Any]] = []
    for factor in dict.fromkeys([1.0, *factors]):
        own = [weight for weight, its in zip(trained, factors, strict=True) if its == factor]
        rate = {} if factor == 1 else {"lr": factor * arguments.learning_rate}
        matrices = [weight for weight in own if weight.ndim > 1]
        vectors = [weight for weight in own if weight.ndim <= 1]
        groups.append({"params": matrices, "weight_decay": arguments.weight_decay, **rate})
        groups.append({"params": vectors, "weight_decay": 0.0, **rate})
    return method.optimizer(kind, groups, options)


def build_lr_scheduler(optimizer: Any, arguments: TrainingArguments) -> Any:
    """Return the learning-rate schedule over all steps of the run, warm-up first."""
    return get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        num_training_steps=arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )


def withhold_unless_finite(optimizer: Any, measured: Tensor) -> None:
    """Make the next `optimizer.step()` change nothing if `measured` is not finite.

    `measured` holds loss and gradient norm. Weights, moments and step counts then stay bit for bit the same. torch's
    fused optimizers take the flag as a tensor (`found_inf`, the protocol of GradScaler: torch/optim/adam.py), so the
    host need not know it. Other optimizers, such as bitsandbytes' 8-bit ones, wait for the GPU in their own step: here
    the flag is read, and without gradients they skip every parameter. The learning-rate schedule advances all the same.
    """
    bad = torch.isfinite(measured).all().logical_not()
    if optimizer.defaults.get("fused"):
        optimizer.found_inf = bad.to(torch.float32)
    elif bool(bad):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = None


def _intervals(kind: str, every: int | None, epoch_steps: int) -> dict[str, Any]:
    # once an epoch, counted in steps: an "epoch" strategy misses a run that ends mid-epoch
    return {f"{kind}_strategy": "steps", f"{kind}_steps": every or epoch_steps}


class Callbacks:
    """Call transformers' callbacks, and hold their requests.

    Attributes:
        handler: transformers' list of callbacks; its default one requests evaluations and checkpoints by intervals.
        state: step, epoch and history of the run.
        control: the callbacks' requests to evaluate, to save and to stop.
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        model: nn.Module,
        callbacks: Sequence[TrainerCallback],
        *,
        epoch_steps: int,
        is_main: bool,
    ) -> None:
        self.arguments, self.epoch_steps, self.is_main = arguments, epoch_steps, is_main
        self.state, self.control = self._state_of(None), TrainerControl()
        trackers = get_reporting_integration_callbacks(arguments.report_to)
        self.handler = CallbackHandler([DefaultFlowCallback, *trackers, *callbacks], model, None, None, None)
        self.at("on_init_end")

    def at(self, event: str, *more: Any) -> None:
        """Call `event` of every callback."""
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, *more)

    def begin(self, checkpoint: Path | None, optimizer: Any, lr_scheduler: Any) -> None:
        """Set step, epoch and history to those of `checkpoint`, or to the first step."""
        self.state = self._state_of(checkpoint)
        self.handler.optimizer, self.handler.lr_scheduler = optimizer, lr_scheduler

    def log(self, logs: dict[str, float], step: int, epoch: float | None) -> None:
        """Add `logs` to the history. Callbacks see the state of the logs' own step."""
        logs = {**logs, "epoch": epoch or 0.0}
        self.state.log_history.append({**logs, "step": step})
        state = copy.copy(self.state)
        state.global_step, state.epoch = step, epoch or 0.0
        self.control = self.handler.on_log(self.arguments, state, self.control, logs)

    def is_best(self, loss: float) -> bool:
        """Return True if no earlier evaluation had a held-out loss as low as `loss`."""
        earlier = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return loss == min(earlier, default=loss) and earlier.count(loss) <= 1

    def stop(self, *, save: bool = False) -> None:
        """End the loop after this step, with a checkpoint if `save` is set."""
        self.control.should_training_stop = True
        self.control.should_save = self.control.should_save or save

    def _state_of(self, checkpoint: Path | None) -> TrainerState:
        """Return transformers' state at the first step or at `checkpoint`, with the present intervals."""
        state = TrainerState() if checkpoint is None else TrainerState.load_from_json(str(checkpoint / TRAINER_STATE))
        state.train_batch_size = 1
        state.max_steps = self.arguments.max_steps
        state.num_train_epochs = math.ceil(state.max_steps / self.epoch_steps)
        state.is_local_process_zero = state.is_world_process_zero = self.is_main
        state.compute_steps(self.arguments, state.max_steps)
        return state


def require_trackers(wanted: Iterable[str]) -> None:
    """Raise UsageError for a tracker that transformers does not know, or that is not installed."""
    here = (*get_available_reporting_integrations(), "all")
    for name in wanted:
        if name in here:
            continue
        if name in INTEGRATION_TO_CALLBACK:
            fix = f"pip install {TRACKER_PACKAGES.get(name, name)}, or set report_to=none"
            raise UsageError(f"the tracker {name} is not installed", where="report_to", fix=fix)
        near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
        fix = f"choose {near[0] if near else ', '.join(sorted(INTEGRATION_TO_CALLBACK))}, or none"
        raise UsageError(f"'{name:.40}' is no tracker of transformers", where="report_to", fix=fix)
