"""demo_view: the display of the demo: a run's own observer, and the stages after training."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from lorafit.api.demo import DemoObserver, DemoResult, demo
from lorafit.api.merge import MergedRun
from lorafit.cli.merge import show_merged
from lorafit.cli.screen.console import duration, heading, near, say, show_next
from lorafit.cli.screen.watch import ConsoleObserver
from lorafit.evaluate import ExactMatch

SAMPLES = 3


class _ConsoleDemo(ConsoleObserver, DemoObserver):
    def data_written(self, train: Path, held_out: Path) -> None:
        heading("data", f"{train} and {held_out.name}")

    def on_exact_match(self, before: ExactMatch, after: ExactMatch) -> None:
        show_exact_match(before, after)

    def on_merge(self, merged: MergedRun) -> None:
        show_merged(merged)


def run_demo(task: str, seed: int, out: str | None, *, method: str, quiet: bool) -> DemoResult:
    """Run the demo, silently or with three samples and the next commands."""
    if quiet:
        return demo(task, seed, out, method=method)
    with _ConsoleDemo() as watch:
        result = demo(task, seed, out, method=method, observer=watch)
    show_samples(result.before, result.after)
    heading("total", f"{duration(result.total_s)}, of which training {duration(result.trained.train_s)}")
    run = str(result.trained.run.path)
    asked = result.after.samples[0].prompt.replace("'", "\\'").replace("\n", "\\n")
    heading("run", f"[bold]{escape(near(run))}[/bold]")
    other = [] if method == "full" else [(f"lorafit export {run} --to gguf", "one file for llama.cpp, measured there")]
    show_next(
        (f"lorafit chat {run} --compare --prompt $'{asked}'", "base and tuned side by side"),
        *other,
        ("lorafit check your.jsonl", "check your own data"),
        ("lorafit train your.jsonl --base MODEL", "train on your own data"),
    )
    return result


def show_exact_match(before: ExactMatch, after: ExactMatch) -> None:
    """Show exact match of base and tuned model on the held-out rows."""
    heading(
        "evaluate",
        f"exact match on {len(after.samples)} held-out rows: "
        f"base {before.share:.1%} → tuned [bold green]{after.share:.1%}[/bold green]",
    )


def show_samples(before: ExactMatch, after: ExactMatch) -> None:
    """Show the first rows with both answers."""
    heading("samples")
    for base, tuned in list(zip(before.samples, after.samples, strict=True))[:SAMPLES]:
        say(f"  [bold]asked[/bold] {escape(tuned.prompt.splitlines()[-1])}")
        first = (base.answer.strip().splitlines() or ["(nothing)"])[0]
        say(f"  [yellow]base [/yellow] {escape(first[:90])}")
        mark = "[green]✓[/green]" if tuned.matches else f"[red]✗[/red] expected {escape(tuned.expected)}"
        say(f"  [green]tuned[/green] {escape(tuned.answer)} {mark}")
