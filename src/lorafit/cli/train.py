"""lorafit train"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli import flags
from lorafit.cli.console import counted, duration, heading, loss, show_findings, show_json, steady
from lorafit.errors import RunFinished

if TYPE_CHECKING:
    from lorafit.api.trained_run import TrainedRun


def train(
    data: flags.Data,
    base: flags.Base = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Run directory; default runs/DATA-BASE.", show_default=False)
    ] = None,
    goal: flags.Goal = None,
    gpu_memory: flags.GpuMemory = None,
    on_bad: flags.OnBad = None,
    on_long: flags.OnLong = None,
    field_map: flags.Map = None,
    holdout: flags.Holdout = None,
    set: flags.Set = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Move the run that is there aside, and begin anew.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="The same bits on every run on this card, somewhat slower.")
    ] = False,
    json: flags.Json = False,
) -> None:
    """Train adapters on DATA, or as a recipe YAML says; the same command goes on with a run that was stopped."""
    named = {
        "base": base,
        "out": out,
        "goal": goal,
        "gpu_memory": gpu_memory,
        "on_bad": on_bad,
        "on_long": on_long,
        "holdout": holdout,
    }
    settings = flags.settings_from(set, **named, field_map=field_map, deterministic=deterministic or None)
    with steady():
        trained = _trained(data, settings, restart=restart, silent=json)
        if not json:
            _say_done(trained)
    if json:
        show_json(trained.to_dict())


def _trained(data: list[str], settings: dict[str, Any], *, restart: bool, silent: bool) -> TrainedRun:
    """`train`, with what it needs imported; a signal in the seconds that takes is heard too."""
    from lorafit.api.early_signals import EarlySignals

    with EarlySignals():
        from lorafit.api.settings import preflight

        preflight(data, settings, restart=restart)
        from lorafit.api.observer import Observer
        from lorafit.api.train import train as run_train
        from lorafit.cli.watch import ConsoleObserver

        watch = ConsoleObserver() if not silent else Observer()
        with watch if isinstance(watch, ConsoleObserver) else _finished_as_json():
            return run_train(data, restart=restart, observer=watch, **settings)


def _say_done(trained: TrainedRun) -> None:
    from lorafit.cli.watch import say_next

    held_out = f", held-out loss {loss(trained.eval_loss)}" if trained.eval_loss is not None else ""
    took = f"{counted(trained.steps, 'step')} in {duration(trained.train_s)}"
    heading("done", f"{took}, loss {loss(trained.loss)}{held_out}")
    show_findings([finding for finding in trained.findings if finding.code.startswith("R")])
    run = str(trained.run.path)
    say_next(
        run,
        [
            (f"lorafit chat {run} --compare", "base and tuned side by side"),
            (f"lorafit merge {run}", "one model to serve, proved"),
        ],
    )


@contextlib.contextmanager
def _finished_as_json() -> Iterator[None]:
    """For machines a run that has nothing left to train is an answer as any other."""
    try:
        yield
    except RunFinished as finished:
        show_json({"run": finished.where, "finished": True, "message": finished.sentence})
        raise typer.Exit from finished
