"""export: the command `lorafit export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import heading, near, say, show_json, show_next, typed
from lorafit.cli.screen.findings_view import show_findings
from lorafit.imports import importing_torch

if TYPE_CHECKING:
    from lorafit.api.ship.export import ExportedRun

EXAMPLES = """Examples:

lorafit export runs/rows-Qwen3-8B --to gguf --quantization q4_k_m

lorafit export runs/orders --to adapter --out served --name orders"""
EXIT_CODES = {"proved": 0, "failed": 1, "not proved": 3}
COLOURS = {"proved": "green", "not proved": "yellow", "failed": "red"}

Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization",
        metavar="FORMAT",
        help="Precision of a GGUF file: f16, bf16, q8_0, q6_k, q5_k_m or q4_k_m; default q8_0.",
        show_default=False,
    ),
]


Form = Annotated[
    Literal["merged", "adapter", "gguf", "gguf-lora"],
    typer.Option(
        "--to", metavar="FORM", case_sensitive=False, help="merged, adapter: vLLM. gguf, gguf-lora: llama.cpp, Ollama."
    ),
]


def export(
    run: flags.Run,
    to: Form = "merged",
    quantization: Quantization = None,
    onto: Annotated[
        Literal["quantized", "original"] | None,
        typer.Option("--onto", help="Base to merge onto; default by measurement.", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FOLDER", help="Folder; adapters of one base can share it.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the adapter; default the run's.", show_default=False),
    ] = None,
    checkpoint: flags.Checkpoint = "last",
    verify_in: Annotated[
        Literal["auto", "vllm", "none"],
        typer.Option("--verify-in", help="vllm: prove it in vLLM too. auto: where vLLM is installed."),
    ] = "auto",
    json: flags.Json = False,
) -> None:
    """Write the run for the program that serves it, and prove its answers there."""
    with importing_torch():
        from lorafit.api.ship.export import export as run_export

    exported = run_export(
        run,
        to=to,
        quantization=quantization,
        onto=onto,
        out=out,
        name=name,
        checkpoint=checkpoint,
        verify_in=verify_in,
    )
    if json:
        show_json(exported.to_dict())
    else:
        show_exported(exported)
    raise typer.Exit(EXIT_CODES[exported.verdict])


def show_exported(exported: ExportedRun) -> None:
    """Show the verdict of every engine, and how the export is served."""
    heading("export", escape(near(str(exported.folder))))
    for engine in exported.verification["engines"]:
        colour = COLOURS[engine["status"]]
        say(f"  [{colour}]{engine['status']}[/{colour}] in {engine['engine']}: {escape(engine['reason'])}")
    if "importance" in exported.verification:
        say(f"  {escape(exported.verification['decision']['reason'])}")
    show_findings(list(exported.findings))
    inside = f"cd {typed(str(exported.folder))} && "  # the commands name files of the folder
    commands = [
        (f"({inside}{each['command']})", f"serve it with {each['engine']}") for each in exported.serving["commands"]
    ]
    if commands:
        show_next(*commands)
