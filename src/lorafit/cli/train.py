"""lorafit train"""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from lorafit.cli import flags
from lorafit.cli.console import duration, heading, show_json


def train(
    data: flags.Data,
    base: flags.Base = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Run directory; default runs/DATA-BASE.", show_default=False)
    ] = None,
    goal: flags.Goal = None,
    vram: flags.Vram = None,
    on_bad: flags.OnBad = None,
    long: flags.Long = None,
    map: flags.Map = None,
    holdout: flags.Holdout = None,
    set: flags.Set = None,
    json: flags.Json = False,
) -> None:
    """Train adapters on DATA, or as a recipe YAML says; the run directory describes itself."""
    from lorafit.api.settings import preflight

    settings = flags.settings_from(set, goal=goal, vram=vram, on_bad=on_bad, long=long, map=map, holdout=holdout)
    preflight(data, {**settings, "base": base, "out": out})
    from lorafit.api.observer import Observer
    from lorafit.api.train import train as run_train
    from lorafit.cli.watch import ConsoleObserver, say_next

    watch = ConsoleObserver() if not json else Observer()
    with watch if isinstance(watch, ConsoleObserver) else contextlib.nullcontext():
        trained = run_train(data, base, out=out, observer=watch, **settings)
    if json:
        show_json(trained.to_dict())
        return
    held_out = f", held-out loss {trained.eval_loss:.4f}" if trained.eval_loss is not None else ""
    heading("done", f"{trained.steps} steps in {duration(trained.train_s)}, loss {trained.loss:.4f}{held_out}")
    run = str(trained.run.path)
    say_next(
        run,
        [
            (f"lorafit chat {run} --compare", "base and tuned side by side"),
            (f"lorafit merge {run}", "one model to serve, proved"),
        ],
    )
