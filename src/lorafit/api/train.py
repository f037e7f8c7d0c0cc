"""train: data and a base in, a run directory with a proved-loadable adapter out."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.integrations import get_available_reporting_integrations

from lorafit.adapters import Counts, attach, count_parameters, save_adapter
from lorafit.api.observer import Observer
from lorafit.api.plan import PlannedRun, plan_prepared
from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.backbone import base_fingerprint, load_backbone, quiet_libraries
from lorafit.config import Resolved, RunConfig, RunDir, base_folder, parse_bytes, write_text
from lorafit.data import Prepared, Record, Rows, Template, prepare, require_clean
from lorafit.engine import assert_isolated, packed
from lorafit.errors import PlanError, TrainingError, UsageError
from lorafit.findings import Finding, Severity
from lorafit.planning import hardware_here
from lorafit.training import FiniteGuard, LorafitTrainer, MetricsLog, TrainingProgress

SAMPLE_ROWS = 256  # held-out rows kept in the run directory, for merge's verification and for a look
ISOLATION_ROWS = 4


@dataclass(frozen=True)
class TrainedRun:
    """A finished run: its directory, the live model, and what it took."""

    run: RunDir
    resolved: Resolved
    model: Any
    template: Template
    train_rows: Rows
    held_out_rows: Rows
    findings: list[Finding]
    counts: Counts
    steps: int
    tokens: int
    train_s: float
    loss: float
    eval_loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "run": str(self.run.path),
            "steps": self.steps,
            "train_rows": len(self.train_rows),
            "held_out_rows": len(self.held_out_rows),
            "loss": self.loss,
            "eval_loss": self.eval_loss,
            "train_s": round(self.train_s, 2),
            "tokens_per_s": round(self.tokens / max(self.train_s, 1e-9)),
            "trainable_parameters": self.counts.trainable,
            "total_parameters": self.counts.total,
            "findings": [finding.to_dict() for finding in self.findings],
        }


def train(
    data: Sequence[str | Path] | str | Path | None = None,
    base: str | None = None,
    *,
    out: str | Path | None = None,
    observer: Observer | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **settings: Any,
) -> TrainedRun:
    """Train LoRA adapters for `data` on the frozen `base`; `settings` are keys of RunConfig.

    `data` may be a recipe YAML. Nothing is left behind by a run that could not start; a run that did start keeps
    its checkpoints. Raises LorafitError subclasses, each one sentence.
    """
    watch = observer or Observer()
    resolved = settle(data, {**settings, "base": base, "out": str(out) if out else None})
    require_data(resolved)
    require_base(resolved)
    _require_one_process_here(resolved)
    run, is_new = _open_run(resolved)
    try:
        with quiet_libraries(run.log):
            template = template_for(resolved)
            prepared = prepare(resolved.config, template, run_dir=run.path, on_progress=watch.reading)
            watch.checked(prepared)
            require_clean(prepared)
            planned = plan_prepared(resolved, prepared, hardware_here(resolved.config))
            watch.planned(planned.plan, planned.resolved)
            findings = _require_runnable(planned, prepared)
            return _fit(run, planned, template, findings, watch, list(callbacks))
    except BaseException:
        _leave_nothing(run, is_new)
        raise


def _require_one_process_here(resolved: Resolved) -> None:
    """UsageError for what this path cannot do yet, before anything is written."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("train runs in one process", where="WORLD_SIZE", fix="start it without torchrun")
    if resolved.config.gpu:
        raise UsageError(
            "train runs on the hardware that is here", where="gpu", fix="use gpu with plan, vram with train"
        )
    trackers = get_available_reporting_integrations()
    unknown = [name for name in resolved.config.report_to if name not in trackers]
    if unknown:
        here = ", ".join(trackers) or "none"
        raise UsageError(f"no tracker '{unknown[0]}' is installed", where="report_to", fix=f"installed are: {here}")


def _open_run(resolved: Resolved) -> tuple[RunDir, bool]:
    path = Path(resolved.config.out) if resolved.config.out else _default_path(resolved)
    is_new = not path.exists()
    return RunDir.create(path), is_new


def _default_path(resolved: Resolved) -> Path:
    """runs/DATA-BASE, with -2, -3, … behind it while the name is taken."""
    stems = f"{Path(resolved.config.data[0]).stem}-{Path(resolved.config.base).name}"
    name = re.sub(r"[^\w.-]+", "-", stems).strip("-")
    path, number = Path("runs") / name, 1
    while path.exists():
        number += 1
        path = Path("runs") / f"{name}-{number}"
    return path


def _leave_nothing(run: RunDir, is_new: bool) -> None:
    """Remove the folder of a run that never started, unless it explains which rows were rejected."""
    if is_new and not run.settings.exists() and not (run.path / "rejected.jsonl").exists():
        shutil.rmtree(run.path, ignore_errors=True)


def _require_runnable(planned: PlannedRun, prepared: Prepared) -> list[Finding]:
    findings = [*prepared.findings, *planned.plan.findings]
    for finding in planned.plan.findings:
        if finding.severity is Severity.ERROR:
            raise PlanError(finding.message, where=finding.code, fix=finding.fix)
    return findings


def _fit(
    run: RunDir,
    planned: PlannedRun,
    template: Template,
    findings: list[Finding],
    watch: Observer,
    callbacks: list[TrainerCallback],
) -> TrainedRun:
    resolved, prepared = planned.resolved, planned.prepared
    config = resolved.config
    watch.loading(run)
    model: Any = attach(load_backbone(config, dense_budget_bytes=_dense_budget(config)), config, planned.plan.targets)
    counts = count_parameters(model)
    with packed(model):
        assert_isolated(model, _shortest(prepared.train, ISOLATION_ROWS))
    watch.attached(counts, config.base)
    trainer = LorafitTrainer(model, config, prepared.train, prepared.holdout, run.checkpoints, callbacks=callbacks)
    _describe(run, planned, template, findings)
    progress = TrainingProgress(watch.stepped, lambda: trainer.last_step.tokens)
    trainer.add_callback(progress)
    trainer.add_callback(MetricsLog(run.metrics))
    trainer.add_callback(FiniteGuard())
    started = time.perf_counter()
    _run(trainer)
    train_s = time.perf_counter() - started
    save_adapter(model, run.adapter, config, base_name=config.base)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return TrainedRun(
        run=run,
        resolved=resolved,
        model=model,
        template=template,
        train_rows=prepared.train,
        held_out_rows=prepared.holdout,
        findings=findings,
        counts=counts,
        steps=trainer.state.global_step,
        tokens=progress.tokens,
        train_s=train_s,
        loss=losses[-1],
        eval_loss=progress.eval_loss,
    )


def _dense_budget(config: RunConfig) -> int | None:
    """Bytes for dequantised copies on a CPU: half of a budget that was set, else half of what is free."""
    return parse_bytes(config.vram, "vram") // 2 if config.vram else None


def _run(trainer: LorafitTrainer) -> None:
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"the card's memory ran out in step {trainer.state.global_step + 1}",
            where=str(trainer.args.output_dir),
            fix=f"lower max_tokens (now {trainer.config.max_tokens}) or set gradient_checkpointing=on",
        ) from error


def _shortest(rows: Rows, count: int) -> list[tuple[Any, Any]]:
    chosen = rows.lengths.argsort(kind="stable")[:count]
    return [(rows.ids(int(row)), rows.mask(int(row))) for row in chosen]


def _describe(run: RunDir, planned: PlannedRun, template: Template, findings: list[Finding]) -> None:
    """Write what describes the run; run.yaml last, since a folder with it holds a run."""
    prepared = planned.prepared
    run.write_json(run.plan, planned.plan.to_dict())
    run.write_json(run.findings, [finding.to_dict() for finding in findings])
    template.save(run.template)
    sample = prepared.holdout if len(prepared.holdout) else prepared.train
    records = [sample.record(index) for index in range(min(len(sample), SAMPLE_ROWS))]
    write_text(run.samples, "".join(_sample_line(record) for record in records))
    config = planned.resolved.config
    fingerprint = base_fingerprint(base_folder(config.base, config.revision, weights=True))
    run.write_json(run.base, {"base": config.base, "revision": config.revision, "fingerprint": fingerprint})
    run.write_config(config, {key: source.value for key, source in planned.resolved.sources.items()})


def _sample_line(record: Record) -> str:
    sample: dict[str, Any] = {"messages": record.messages(), "source": record.source}
    if record.tools:
        sample["tools"] = [dict(tool) for tool in record.tools]
    return json.dumps(sample, ensure_ascii=False) + "\n"
