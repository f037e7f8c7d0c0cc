"""merge: the command `lorafit merge`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from lorafit.cli import flags
from lorafit.cli.screen.console import PEOPLE, counted, duration, gib, heading, near, say, show_json, show_next, typed
from lorafit.cli.screen.findings_view import show_findings
from lorafit.imports import importing_torch

if TYPE_CHECKING:
    from lorafit.api.merge import MergedRun
    from lorafit.export import Verification
    from lorafit.export.verify import Precisions


EXAMPLES = """Examples:

lorafit merge runs/rows-Qwen3-8B

lorafit merge runs/rows-Qwen3-8B --onto original --out models/mine

lorafit merge runs/rows-Qwen3-8B --format gguf-q4_k_m"""

Original = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="MODEL",
        help="The 16-bit original of a base that is stored in 4 bits.",
        show_default=False,
    ),
]
Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="safetensors; for llama.cpp gguf-f16, -bf16, -q8_0, -q6_k, -q5_k_m or -q4_k_m; or a plug-in.",
    ),
]


def merge(
    run: flags.Run,
    onto: Annotated[
        Literal["quantized", "original"] | None,  # as config.MergeBase, which imports pydantic
        typer.Option(
            "--onto", help="The dequantized 4-bit base or the original; default by measurement.", show_default=False
        ),
    ] = None,
    base: Original = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Model folder; default RUN/exports/merged-…", show_default=False),
    ] = None,
    export_format: Format = "safetensors",
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option("--dtype", help="Dtype of the weights; auto: the original's own, or bf16 onto quantized."),
    ] = "auto",
    checkpoint: flags.Checkpoint = "last",
    json: flags.Json = False,
) -> None:
    """Write the merged weights, reload them, and measure them against the live adapter model."""
    with importing_torch():
        from lorafit.api.merge import merge as run_merge

    merged = run_merge(
        run, onto=onto, base=base, out=out, export_format=export_format, dtype=dtype, checkpoint=checkpoint
    )
    if json:
        show_json(merged.to_dict())
    else:
        show_merged(merged)
        show_next(*_next(merged, run))
    raise typer.Exit(0 if merged.passed else 1)


def _next(merged: MergedRun, run: str) -> list[tuple[str, str]]:
    """Return (command, its purpose) that uses the artefact, or that does without one that failed.

    Empty for a format that only another program opens.
    """
    if not merged.passed:
        if merged.report.onto == "original":
            return [(typed("lorafit", "merge", run, "--onto", "quantized"), "onto the base that was trained over")]
        return [(typed("lorafit", "chat", run), "talk to the trained model; do not serve this one")]
    if gguf := next(merged.folder.glob("*.gguf"), None):
        return [(typed("llama-server", "--jinja", "-m", str(gguf)), "serve it with llama.cpp")]
    if merged.verification.export_format != "safetensors":
        return []
    return [(typed("lorafit", "chat", str(merged.folder)), "talk to the merged model")]


def show_merged(merged: MergedRun) -> None:
    """Show the written model, the comparison and the verdict."""
    report = merged.report
    size = f"{gib(report.total_bytes)} in {counted(report.shards, 'shard')}"
    step = f"step {report.step} " if report.step is not None else ""
    what = "every weight of the run" if report.onto == "whole" else f"onto the {report.onto} base"
    heading("merge", f"{step}{what}: {report.merged_weights} weights, {size}, {duration(report.elapsed_s)}")
    show_verification(merged.verification)
    if merged.passed:
        heading("chosen", escape(merged.precisions.sentence))
    _show_precisions(merged.precisions)
    for proof in merged.proofs:
        if proof.status == "failed":
            say(f"  [red]{proof.status}[/red] in {proof.engine}: {escape(proof.reason)}")
    show_findings(merged.findings)
    say(f"  {escape(near(str(merged.folder)))}")


def _show_precisions(precisions: Precisions) -> None:
    """Show the task loss of each base that was measured, in 16 bits and in NF4."""
    bases = dict.fromkeys(row.onto for row in precisions.rows)
    if len(bases) < 2:
        return
    found = {(row.onto, row.precision == "nf4"): f"{row.measured.loss:.4f}" for row in precisions.rows}
    table = _table("task loss, merged onto", "in 16 bits", "in NF4")
    for onto in bases:
        table.add_row(f"the {onto} base", found.get((onto, False), ""), found.get((onto, True), ""))
    PEOPLE.print(Padding(table, (0, 0, 0, 2)))


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    for title in numbers:
        table.add_column(title, justify="right")
    return table


def show_verification(result: Verification) -> None:
    """Show a table of each model against the live adapter model on held-out rows."""
    live = "live model" if result.onto == "whole" else "live adapter model"
    table = _table(f"against the {live}", "mean KL", "top-1 agreement", "task loss")
    table.add_row(live, "", "", f"{result.live_loss:.4f}")
    kind = result.merged_dtype if result.export_format == "safetensors" else result.export_format
    for name, part in (
        (f"{'exported' if result.onto == 'whole' else 'merged'} ({kind}, from disk)", result.merged),
        ("noise floor (live model, other precision)", result.floor),
        ("base without training" if result.onto == "whole" else "base without adapter", result.base),
    ):
        table.add_row(name, f"{part.kl:.2e}", f"{part.top1_agreement:.2%}", f"{part.loss:.4f}")
    verdict = "[bold green]verified[/bold green]" if result.passed else "[bold red]not verified[/bold red]"
    heading("verify", f"{verdict}: {result.reason}; {result.rows} rows of the run, {result.positions:,} tokens")
    PEOPLE.print(Padding(table, (0, 0, 0, 2)))
