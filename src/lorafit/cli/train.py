"""train: the command `lorafit train`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.ask import ask_for_run
from lorafit.cli.screen.console import (
    counted,
    duration,
    heading,
    is_follower,
    loss,
    near,
    show_json,
    show_next,
    steady,
    typed,
)
from lorafit.cli.screen.data_view import ReadingBar
from lorafit.cli.screen.findings_view import show_findings
from lorafit.cli.screen.plan_view import gpus_in_words
from lorafit.errors import RunFinished, UsageError
from lorafit.imports import importing_torch

if TYPE_CHECKING:
    from lorafit.api.train import TrainedRun

EXAMPLES = """Examples:

lorafit train rows.jsonl --base Qwen/Qwen3-8B

lorafit train rows.jsonl --base Qwen/Qwen3-8B --gpu-memory 8GB --lr 1e-4 --epochs 2

lorafit train recipe.yaml"""


def train(
    data: flags.Data = None,
    base: flags.Base = None,
    out: flags.Out = None,
    goal: flags.Goal = None,
    gpu_memory: flags.GpuMemory = None,
    method: flags.Method = None,
    gpus: flags.Gpus = None,
    lr: flags.Lr = None,
    epochs: flags.Epochs = None,
    rank: flags.Rank = None,
    max_length: flags.MaxLength = None,
    batch: flags.Batch = None,
    on_bad: flags.OnBad = None,
    on_long: flags.OnLong = None,
    encoding: flags.Encoding = None,
    map: flags.Map = None,
    holdout: flags.Holdout = None,
    set: flags.Set = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Move the existing run aside and start a new one.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Give every run on this GPU the same bits; somewhat slower.")
    ] = False,
    json: flags.Json = False,
) -> None:
    """Train on DATA, or with a recipe YAML. The same command resumes a stopped run."""
    if not data and not set and not json and sys.stdin.isatty() and sys.stdout.isatty():
        data, base, gpu_memory = ask_for_run(base, gpu_memory)
    settings = flags.settings_from(
        set, base=base, out=out, goal=goal, gpu_memory=gpu_memory, method=method, gpus=gpus, lr=lr,
        epochs=epochs, rank=rank, max_length=max_length, examples_per_step=batch, on_bad=on_bad, on_long=on_long,
        encoding=encoding, field_map=map, holdout=holdout, deterministic=deterministic or None,
    )  # fmt: skip
    if not data and not settings.get("data"):
        raise UsageError("no data are named", fix="pass a file: lorafit train rows.jsonl --base MODEL")
    _launch_several(data or [], settings, restart=restart, as_json=json)
    with steady():
        typed_words = flags.words_to_read(data, {"encoding": encoding, "field_map": map}, set)
        trained = _trained(data or [], settings, typed_words, restart=restart, as_json=json)
        if not json and not is_follower():
            _show_done(trained)
    if json and not is_follower():
        show_json(_result_as_json(trained))


def _launch_several(data: list[str], settings: dict[str, Any], *, restart: bool, as_json: bool) -> None:
    """Run this command once on each GPU, and end, if the settings ask for several, or the plan does."""
    from lorafit.runs.signals import EarlySignals

    with steady(), EarlySignals():
        from lorafit.api.processes.chosen_gpus import chosen_gpus

        with ReadingBar() as bar:
            chosen = chosen_gpus(data, settings, restart=restart, on_progress=bar.show)
        if chosen is None:
            return
        count, reason = 1, chosen.reason
        if chosen.value != 1:
            from lorafit.api.processes.launch import launch, processes_to_start

            count = processes_to_start(chosen)
            reason = reason if count > 1 else "torch cannot use all of the visible ones"
        if chosen.source == "plan" and not as_json:
            heading("gpus", escape(gpus_in_words(count, reason)))
    if count > 1:
        sys.exit(launch(count, sys.argv[1:]))


def _trained(
    data: list[str], settings: dict[str, Any], typed_words: list[str], *, restart: bool, as_json: bool
) -> TrainedRun:
    """Train. Signals during the imports are handled too.

    `typed_words` are the files and the flags that say how to read them, for commands in fixes.
    """
    from lorafit.runs.launched import end_with_launcher
    from lorafit.runs.signals import EarlySignals

    with EarlySignals():
        end_with_launcher()
        from lorafit.api.settings import require_startable

        require_startable(data, settings, restart=restart)
        with importing_torch():
            from lorafit.api.train import train as run_train
            from lorafit.cli.screen.watch import ConsoleObserver, JsonObserver

        watch = JsonObserver() if as_json else ConsoleObserver(typed_words)
        if is_follower():
            return run_train(data, restart=restart, **settings)
        with watch if isinstance(watch, ConsoleObserver) else _finished_as_json():
            return run_train(data, restart=restart, observer=watch, **settings)


def _show_done(trained: TrainedRun) -> None:
    held_out = f", held-out loss {loss(trained.eval_loss)}" if trained.eval_loss is not None else ""
    took = f"{counted(trained.steps, 'step')} in {duration(trained.train_s)}"
    heading("done", f"{took}, loss {loss(trained.loss)}{held_out}")
    if trained.best and (trained.eval_loss is None or trained.best[1] <= trained.eval_loss):
        heading("best", _best(trained.best, trained.steps))
    show_findings([finding for finding in trained.findings if finding.code.startswith("R")])
    run = str(trained.run.path)
    heading("run", f"[bold]{near(run)}[/bold]")
    show_next(
        (typed("lorafit", "chat", run, "--compare"), "base and tuned side by side"),
        (typed("lorafit", "merge", run), "one model to serve, verified"),
    )


def _best(best: tuple[int, float], steps: int) -> str:
    """Return the checkpoint with the lowest held-out loss beside the last one, and how to use it."""
    step, held_out = best
    if step == steps:
        return f"the last step, held-out loss {loss(held_out)}"
    return f"step {step}, held-out loss {loss(held_out)}; chat, merge, export and serve take it with --checkpoint best"


def _result_as_json(trained: TrainedRun) -> dict[str, Any]:
    """Return the finished run as JSON values."""
    run = trained.run
    steps = sorted(folder for folder in run.checkpoints.glob("step-*") if folder.is_dir())
    return {
        "ok": True,
        **trained.to_dict(),
        "adapter": str(run.adapter),
        "checkpoint": str(steps[-1]) if steps else None,
        "metrics": str(run.metrics),
    }


@contextlib.contextmanager
def _finished_as_json() -> Iterator[None]:
    """Report a run with nothing left to train as JSON, since it is no error."""
    try:
        yield
    except RunFinished as finished:
        show_json({"ok": True, "run": finished.where, "finished": True, "message": finished.sentence})
        raise typer.Exit from finished
