"""Rows, settings and models for tests that train: the demo's base, and tiny random ones."""

import json
import os
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from lorafit.config import resolve
from lorafit.data import Encoded, Rows
from lorafit.demo import BASE, TASKS
from lorafit.demo.tasks import rows as task_rows


def write_rows(path: Path, count: int = 40, task: str = "tickets", seed: int = 0) -> Path:
    """Instruction JSONL of a demo task."""
    path.write_text("".join(json.dumps(row) + "\n" for row in task_rows(TASKS[task], seed, count)))
    return path


def encoded_rows(*lengths: int, seed: int = 0, low: int = 4, high: int = 250) -> Rows:
    """Random rows of these lengths, the second half of each supervised."""
    random = np.random.default_rng(seed)
    return Rows.from_encoded(
        [
            Encoded(random.integers(low, high, length).tolist(), [place >= length // 2 for place in range(length)], ())
            for length in lengths
        ]
    )


def settings(**given):
    """A RunConfig over the demo base, without dropout unless asked for."""
    return resolve(flags={"base": str(BASE), "dropout": 0.0, **given}).config


class Send(TrainerCallback):
    """Send this process a signal at the beginning of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)
