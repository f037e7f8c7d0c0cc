"""demo: a small run through the user's own functions.

It goes through data, train, exact match, merge and verify.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.api.merge import MergedRun, merge
from lorafit.api.observer import Observer
from lorafit.api.train import TrainedRun, train
from lorafit.config import load_recipe
from lorafit.demo import BASE, RECIPE, Task, split_files, task_named, write_split
from lorafit.errors import RunDirError, TrainingStopped, UsageError
from lorafit.evaluate import ExactMatch, exact_match
from lorafit.methods import method_of
from lorafit.runs import RunDir

TRAIN_ROWS, HELD_OUT_ROWS = 1500, 200
SETTINGS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"method": "full", "lr": 1e-3, "epochs": 2}}
"""Settings beside the demo's recipe, by method. Small bases take high learning rates."""


class DemoObserver(Observer):
    """Observe the stages after training too."""

    def data_written(self, train: Path, held_out: Path) -> None:
        """Show the files that hold the task's rows."""

    def on_exact_match(self, before: ExactMatch, after: ExactMatch) -> None:
        """Show exact match on the held-out rows, base and tuned."""

    def on_merge(self, merged: MergedRun) -> None:
        """Show the merged model and its comparison."""


@dataclass(frozen=True)
class DemoResult:
    """Hold the demo's results.

    Attributes:
        task: the task's name.
        seed: the seed of data and training.
        before: exact match of the base on the held-out rows; its share is 0 to 1.
        after: exact match of the tuned model.
        trained: the finished run.
        merged: the merged model.
        total_s: seconds from start to end.
    """

    task: str
    seed: int
    before: ExactMatch
    after: ExactMatch
    trained: TrainedRun
    merged: MergedRun
    total_s: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {
            "task": self.task,
            "seed": self.seed,
            "method": self.trained.resolved.config.method,
            "exact_match_before": self.before.share,
            "exact_match_after": self.after.share,
            "train_s": round(self.trained.train_s, 2),
            "total_s": round(self.total_s, 2),
            "run": str(self.trained.run.path),
            "steps": self.trained.steps,
            "tokens_per_s": round(self.trained.tokens / max(self.trained.train_s, 1e-9)),
            "merged": str(self.merged.folder),
            "verification": self.merged.verification.to_dict(),
        }


def demo(
    task: str = "orders",
    seed: int = 0,
    out: str | Path | None = None,
    *,
    method: str = "lora",
    observer: DemoObserver | None = None,
) -> DemoResult:
    """Teach the bundled base one of its three tasks with adapters or by `method` full, and verify the result.

    The demo takes under three minutes on two cores.
    """
    started = time.perf_counter()
    watch = observer or DemoObserver()
    chosen = task_named(task)
    if method not in SETTINGS:
        raise UsageError(f"'{method:.40}' is no method", where="method", fix=f"choose {' or '.join(SETTINGS)}")
    path = Path(out) if out else _free_path(task, seed, method)
    train_file, held_out_file = _rows_in(RunDir(path), chosen, seed, method)
    watch.data_written(train_file, held_out_file)
    settings = {**load_recipe(RECIPE), **SETTINGS[method], "seed": seed, "holdout": str(held_out_file)}
    try:
        trained = train([train_file], str(BASE), out=path, observer=watch, **settings)
    except TrainingStopped as stopped:
        again = ["lorafit", "demo", "--task", task, "--seed", str(seed), "--method", method, "--out", str(path)]
        fix = f"resume with: {shlex.join(again)}"
        raise TrainingStopped(stopped.exit_code - 128, stopped.what, where=stopped.where, fix=fix) from stopped
    after = exact_match(trained.model, trained.held_out_rows, trained.template)
    with method_of(trained.resolved.config).without(trained.model):
        before = exact_match(trained.model, trained.held_out_rows, trained.template)
    watch.on_exact_match(before, after)
    merged = merge(trained.run.path)
    watch.on_merge(merged)
    return DemoResult(task, seed, before, after, trained, merged, time.perf_counter() - started)


def _rows_in(run: RunDir, task: Task, seed: int, method: str) -> tuple[Path, Path]:
    """Return the files of the task's rows in the folder of `run`: those of a stopped demo, or new ones.

    Raises RunDirError for a folder that holds a finished run, another run or other files.
    """
    files = split_files(task, run.path / "data")
    if run.is_finished:
        rest = " and ".join(shlex.join(["lorafit", verb, str(run.path)]) for verb in ("eval", "merge"))
        what = "this folder already holds a trained run"
        raise RunDirError(what, where=str(run.path), fix=f"choose another --out, or measure and merge it: {rest}")
    if run.holds_run and all(file.is_file() for file in files):
        config = run.config()
        held_out = Path(str(config.holdout)).resolve()
        if (config.seed, config.method, held_out) == (seed, method, files[1].resolve()):
            return files
    written = {path.name for path in files[0].parent.glob("*")}
    if run.foreign() != ["data"] or not written <= {file.name for file in files}:  # no rows of a demo alone
        RunDir.create(run.path)
    return write_split(task, files[0].parent, seed, TRAIN_ROWS, HELD_OUT_ROWS)


def usual_path(task: str, seed: int, method: str) -> Path:
    """Return the default run directory of a demo."""
    return Path("runs") / f"demo-{task}{'' if method == 'lora' else f'-{method}'}-seed{seed}"


def _free_path(task: str, seed: int, method: str) -> Path:
    """Return the default path, with -2, -3, … appended while it exists."""
    usual = path = usual_path(task, seed, method)
    number = 1
    while path.exists():
        number += 1
        path = usual.with_name(f"{usual.name}-{number}")
    return path
