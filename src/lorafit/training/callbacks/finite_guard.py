"""FiniteGuard: stops a run whose numbers have gone bad, before anything of it is saved."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorafit.errors import TrainingError


class FiniteGuard(TrainerCallback):
    """Raises TrainingError, naming the step, when the loss or the gradient norm is not finite."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
            value = (given.get("logs") or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise TrainingError(
                    f"the {words} of step {state.global_step} is {float(value)}",
                    where=str(args.output_dir),
                    fix="lower lr; checkpoints written before that step are whole",
                )
