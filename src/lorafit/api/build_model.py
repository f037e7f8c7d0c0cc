"""build_model: load the base, make it trainable, and prove what training relies on, on a few of the run's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorafit.api.plan import PlannedRun
from lorafit.backbone import load_backbone
from lorafit.config import RunConfig, parse_bytes
from lorafit.data import Rows
from lorafit.engine import (
    PAGE_BYTES,
    assert_isolated,
    let_blocks_grow,
    lock_pages_by_threads,
    packed,
    vocabulary_loss_for,
    warm_compiler,
)
from lorafit.methods import Method, method_of
from lorafit.methods.lora import Counts, count_parameters
from lorafit.objectives import Objective, Sft

PROOF_ROWS, PROOF_TOKENS = 4, 256


@dataclass(frozen=True)
class BuiltModel:
    """A base that a method has made trainable, and what is minimised.

    Attributes:
        model: the model; its rows are proved isolated from each other under packed attention.
        method: how it was made trainable.
        objective: the loss, proved to be the model's own.
        counts: trainable and total parameters.
        note: why the loss takes more memory than it has to; empty where it does not.
    """

    model: Any
    method: Method
    objective: Objective
    counts: Counts
    note: str


def build_model(planned: PlannedRun) -> BuiltModel:
    """Return the model of a planned run. Raises BackboneError, AdapterError."""
    config = planned.resolved.config
    lock_pages_by_threads()
    let_blocks_grow()
    enforce_budget(config)
    if torch.cuda.is_available() and config.compile != "off":
        warm_compiler()
    method = method_of(config)
    base = load_backbone(config, dense_budget_bytes=_dense_budget(config))
    model = method.prepare(base, config, planned.plan.targets)
    samples = _samples(planned.prepared.train)
    with packed(model):
        assert_isolated(model, samples)
        loss = vocabulary_loss_for(model, samples)
    return BuiltModel(model, method, Sft(loss), count_parameters(model), loss.reason)


def enforce_budget(config: RunConfig) -> None:
    """Keep this process within `gpu_memory` from here on; called before anything is loaded."""
    if torch.cuda.is_available() and config.gpu_memory is not None:
        _, total = torch.cuda.mem_get_info()
        limit = max(
            0, parse_bytes(config.gpu_memory, "gpu_memory") - PAGE_BYTES
        )  # what a block that grows may take beyond it
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))


def _dense_budget(config: RunConfig) -> int | None:
    """Return the bytes for dequantised copies on a CPU: half of a budget that was set, else half of what is free."""
    return parse_bytes(config.gpu_memory, "gpu_memory") // 2 if config.gpu_memory else None


def _samples(rows: Rows) -> list[tuple[Any, Any]]:
    """Return the beginnings of the shortest rows, every token in the loss, to run proofs on."""
    chosen = rows.lengths.argsort(kind="stable")[:PROOF_ROWS]
    beginnings = [rows.ids(int(row))[:PROOF_TOKENS] for row in chosen]
    return [(ids, np.arange(len(ids)) > 0) for ids in beginnings]
