"""The demo as it happens: a run's own observer, and the stages after training."""

from __future__ import annotations

from pathlib import Path

from lorafit.api.demo import DemoObserver, DemoResult, demo
from lorafit.api.merge import MergedRun
from lorafit.cli.console import duration, heading
from lorafit.cli.demo import show_exact_match, show_samples
from lorafit.cli.merge import show_merged
from lorafit.cli.watch import ConsoleObserver, say_next
from lorafit.evaluate import ExactMatch


class _ConsoleDemo(ConsoleObserver, DemoObserver):
    def data_written(self, train: Path, held_out: Path) -> None:
        heading("data", f"{train} and {held_out.name}")

    def matched(self, before: ExactMatch, after: ExactMatch) -> None:
        show_exact_match(before, after)

    def merged(self, merged: MergedRun) -> None:
        show_merged(merged)


def run_demo(task: str, seed: int, out: str | None, *, quiet: bool) -> DemoResult:
    """Run it, in silence or shown with three samples and what to type next."""
    if quiet:
        return demo(task, seed, out)
    with _ConsoleDemo() as watch:
        result = demo(task, seed, out, observer=watch)
    show_samples(result.before, result.after)
    heading("total", f"{duration(result.total_s)}, of which training {duration(result.trained.train_s)}")
    run = str(result.trained.run.path)
    asked = result.after.samples[0].prompt.replace("'", "\\'").replace("\n", "\\n")
    say_next(
        run,
        [
            (f"lorafit chat {run} --compare --prompt $'{asked}'", "base and tuned side by side"),
            (f"lorafit merge {run} --onto original", "onto the 16-bit base instead"),
            ("lorafit check your.jsonl", "is your data ready?"),
            ("lorafit train your.jsonl --base MODEL", "your own run"),
        ],
    )
    return result
