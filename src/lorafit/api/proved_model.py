"""proved_model: the adapted base, after what training relies on is proved on it and on a few of the run's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lorafit.api.plan import PlannedRun
from lorafit.api.rehearsed_layers import enforce_budget
from lorafit.backbone import load_backbone
from lorafit.config import RunConfig, parse_bytes
from lorafit.data import Rows
from lorafit.engine import (
    VocabularyLoss,
    assert_isolated,
    let_blocks_grow,
    lock_pages_by_threads,
    packed,
    vocabulary_loss_for,
    warm_compiler,
)
from lorafit.methods.lora import attach

PROOF_ROWS, PROOF_TOKENS = 4, 256


def proved_model(planned: PlannedRun) -> tuple[Any, VocabularyLoss]:
    """The adapted base on packed attention, rows proved isolated, and the loss that is proved to be its own."""
    config = planned.resolved.config
    lock_pages_by_threads()
    let_blocks_grow()
    enforce_budget(config)
    if torch.cuda.is_available() and config.compile != "off":
        warm_compiler()
    model: Any = attach(load_backbone(config, dense_budget_bytes=_dense_budget(config)), config, planned.plan.targets)
    samples = _samples(planned.prepared.train)
    with packed(model):
        assert_isolated(model, samples)
        return model, vocabulary_loss_for(model, samples)


def _dense_budget(config: RunConfig) -> int | None:
    """Bytes for dequantised copies on a CPU: half of a budget that was set, else half of what is free."""
    return parse_bytes(config.gpu_memory, "gpu_memory") // 2 if config.gpu_memory else None


def _samples(rows: Rows) -> list[tuple[Any, Any]]:
    """The beginnings of the shortest rows, every token in the loss: what proofs run on, whatever the longest row."""
    chosen = rows.lengths.argsort(kind="stable")[:PROOF_ROWS]
    beginnings = [rows.ids(int(row))[:PROOF_TOKENS] for row in chosen]
    return [(ids, np.arange(len(ids)) > 0) for ids in beginnings]
