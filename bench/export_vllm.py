"""Exports proved in vLLM: a merged folder and a folder of adapters. `python bench/export_vllm.py OUT RUN [RUN …]`.

LORAFIT_VLLM names the program `vllm`. The runs have one base; `lorafit demo` makes such runs. Prints a table.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from lorafit.api.ship.export import ExportedRun, export


def row(name: str, exported: ExportedRun) -> str:
    """Return a line of the table."""
    engines = exported.verification["engines"]
    verdicts = "; ".join(f"{each['engine']}: {each['status']}, {each['reason']}" for each in engines)
    return f"| {name} | {exported.verdict} | {exported.verification['merged']['kl']:.1e} | {verdicts} |"


def main() -> None:
    out, runs = Path(sys.argv[1]), [Path(each) for each in sys.argv[2:]]
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    print("| export | verdict | KL in transformers | programs |\n|---|---|---|---|", flush=True)
    exported = [("merged", export(runs[0], out=out / "merged", verify_in="vllm"))]
    print(row(*exported[0]), flush=True)
    for run in runs:
        made = export(run, to="adapter", out=out / "served", name=run.name, verify_in="vllm")
        exported.append((f"adapter {run.name}", made))
        print(row(*exported[-1]), flush=True)
    sys.exit(any(each.verdict != "proved" for _, each in exported))


if __name__ == "__main__":
    main()
