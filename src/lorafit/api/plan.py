"""plan: method, rank, targets, memory, time and cost, each with its reason.

Planning needs no torch, no GPU and no weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.config import Resolved, RunConfig, Source
from lorafit.data import Prepared, largest_step, padded_share, prepare
from lorafit.data.summary import Progress
from lorafit.errors import DataError
from lorafit.findings import has_errors
from lorafit.hardware import Hardware, hardware_for
from lorafit.memory import DataStats
from lorafit.planning import Plan, choose_gpus, make_plan, most_gpus, plan_recipe
from lorafit.planning.forecast import steps_of
from lorafit.shapes import ModelShape

TOO_LONG = "D020"
SAMPLE_ROWS = 20_000  # rows whose steps tell how much of every step would be padding


@dataclass(frozen=True)
class PlannedRun:
    """Hold a plan, its settings and its data.

    Attributes:
        plan: the plan.
        resolved: the settings, with the plan's values.
        prepared: the data that the plan was made for.
    """

    plan: Plan
    resolved: Resolved
    prepared: Prepared

    @property
    def recipe(self) -> str:
        """Return the YAML recipe that runs this plan, or that describes an unsupported method."""
        return plan_recipe(self.plan, self.resolved.config)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
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
    """Plan a run of `data` on `base` for the hardware here, or for the settings `gpu`, `gpus` and `gpu_memory`."""
    resolved = settle(data, {**settings, "base": base})
    require_data(resolved)
    require_base(resolved)
    prepared = prepare(resolved.config, template_for(resolved), on_progress=on_progress, reads_rows=False)
    return plan_on_gpus(resolved, prepared, hardware_for(resolved.config))


def plan_prepared(resolved: Resolved, prepared: Prepared, hardware: Hardware, world: int = 1) -> PlannedRun:
    """Return the plan for data that are already read. Raises DataError if no row is left to train on.

    `world` processes of a launcher use as many GPUs, where the settings name none.
    """
    config = resolved.config
    spread = {"gpus": world} if world > 1 and config.gpus is None else {}
    asked = replace(resolved, config=config.model_copy(update=spread))
    require_rows(prepared, config)
    shape = ModelShape.from_base(config.base, config.revision).for_rows(prepared.longest)
    made = make_plan(asked, stats_of(prepared, config), shape, hardware)
    return PlannedRun(made, resolved.planned(made.settings()), prepared)


def plan_on_gpus(resolved: Resolved, prepared: Prepared, hardware: Hardware) -> PlannedRun:
    """Return the plan as `plan_prepared` does, for several GPUs of this machine where that is faster.

    The plan then has a decision for `gpus`. Settings that name GPUs, and a machine with one, leave nothing to decide.
    """
    config = resolved.config
    alone = plan_prepared(resolved, prepared, hardware)
    if config.gpus is not None or config.gpu is not None or hardware.count == 1:
        return alone
    count = most_gpus(hardware, alone.plan.stats, config.examples_per_step)
    together = plan_prepared(resolved, prepared, hardware, count) if count > 1 else alone
    decision = choose_gpus(alone.plan, together.plan)
    chosen = together if decision.value > 1 else alone
    decided = replace(chosen.plan.decided, decisions=(*chosen.plan.decisions, decision))
    settled = chosen.resolved.config.model_copy(update={"gpus": decision.value})
    sources = {**chosen.resolved.sources, "gpus": Source.PLAN}
    return PlannedRun(
        replace(chosen.plan, decided=decided), replace(chosen.resolved, config=settled, sources=sources), prepared
    )


def require_rows(prepared: Prepared, config: RunConfig) -> None:
    """Raise DataError if no row is left to train on."""
    if len(prepared.train):
        return
    first = next((finding for finding in prepared.findings if finding.code == TOO_LONG), None)
    if first is not None:
        why = f"rows are longer than max_length ({config.max_length:,}) [{TOO_LONG}]"
        fix = "raise max_length, or set on_long: split-turns"
    else:
        first = next(iter(prepared.findings), None)
        why, fix = f"{prepared.summary.read:,} were read", "'lorafit check' lists what is wrong with them"
    raise DataError(f"no row is left to train on: {why}", where=first.where if first else None, fix=fix)


def stats_of(prepared: Prepared, config: RunConfig) -> DataStats:
    """Return the data stats: sizes of the rows, and the largest step that `config` makes."""
    train = prepared.train
    tokens = int(train.lengths.sum())
    stats = DataStats(
        rows=len(train),
        tokens=tokens,
        supervised_tokens=int(train.supervised.sum()),
        longest=int(train.lengths.max()) if len(train) else 0,
        mean_tokens=tokens / max(len(train), 1),
        holdout_rows=len(prepared.holdout),
    )
    largest = largest_step(train.lengths, config.examples_per_step, config.seed, steps_of(config, stats))
    sample = train.lengths[:: 1 + len(train) // SAMPLE_ROWS]
    share = padded_share(sample, config.examples_per_step, config.max_length, config.seed)
    return replace(stats, largest_step=int(train.lengths[largest].sum()), padded_share=share)
