"""plan: method, rank, targets, memory, time and cost, each with its reason; no torch, no GPU, no weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.config import Resolved, RunConfig
from lorafit.data import Prepared, largest_step, prepare
from lorafit.data.summary import Progress
from lorafit.findings import has_errors
from lorafit.planning import DataFacts, Hardware, ModelShape, Plan, hardware_for, make_plan, plan_recipe
from lorafit.planning.duration import steps_of


@dataclass(frozen=True)
class PlannedRun:
    """The plan, the settings it leads to, and the data it was made for."""

    plan: Plan
    resolved: Resolved
    prepared: Prepared

    @property
    def recipe(self) -> str:
        """The YAML recipe that runs this plan; of a method lorafit cannot run yet, what the run would be."""
        return plan_recipe(self.plan, self.resolved.config)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        settings = {key: {"value": value, "source": source} for key, value, source in self.resolved.table()}
        findings = [*self.prepared.findings, *self.plan.findings]
        return {
            "ok": not has_errors(findings),
            "findings": [finding.to_dict() for finding in findings],
            "plan": self.plan.to_dict(),
            "settings": settings,
            "data": self.prepared.summary.to_dict(),
            "recipe": self.recipe,
        }


def plan(
    data: Sequence[str | Path] | str | Path | None = None,
    /,
    base: str | Path | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> PlannedRun:
    """Plan a run of `data` on `base` for the hardware here, or for the settings `gpu` and `vram`."""
    resolved = settle(data, {**settings, "base": base})
    require_data(resolved)
    require_base(resolved)
    prepared = prepare(resolved.config, template_for(resolved), on_progress=on_progress)
    return plan_prepared(resolved, prepared, hardware_for(resolved.config))


def plan_prepared(resolved: Resolved, prepared: Prepared, hardware: Hardware) -> PlannedRun:
    """The plan for data that are already read, on `hardware`."""
    config = resolved.config
    shape = ModelShape.from_base(config.base, config.revision)
    made = make_plan(resolved, facts_of(prepared, config), shape, hardware)
    return PlannedRun(made, resolved.planned(made.settings()), prepared)


def facts_of(prepared: Prepared, config: RunConfig) -> DataFacts:
    """What the plan needs to know of the data, and of how `config` walks through them."""
    train = prepared.train
    tokens = int(train.lengths.sum())
    facts = DataFacts(
        rows=len(train),
        tokens=tokens,
        supervised_tokens=int(train.supervised.sum()),
        longest=int(train.lengths.max()) if len(train) else 0,
        mean_tokens=tokens / max(len(train), 1),
        holdout_rows=len(prepared.holdout),
    )
    largest = largest_step(train.lengths, config.examples_per_step, config.seed, steps_of(config, facts))
    return replace(facts, largest_step=int(train.lengths[largest].sum()))
