"""The engine's speed beside its peers, on one GPU, in one session: each arm does the same work and prints a JSON line.

    python bench/engine.py base DIR                  # a random Llama-3.1-8B-shaped base in NF4, with a small tokenizer
    python bench/engine.py run ARM DIR [options]     # one arm, one line
    python bench/engine.py table DIR OUT [--only …]  # all rows of docs/performance.md's table, as Markdown

Arms: `lorafit` (through `lorafit.train`, as any user calls it), and where they are installed `hf` (transformers, peft,
bitsandbytes), `liger`, `unsloth`. Work: `dense` rows of one length, all supervised, or `real`: instruction-shaped
rows (lognormal lengths, mean 147 tokens), where `trl`, `trl_pack`, `unsloth_pack` and the classic `padded` recipe run
through their own trainers. A budget (--vram GiB) is enforced with `torch.cuda.set_per_process_memory_fraction`, and the
peak quoted is `max_memory_reserved`. Speed is that of all steps after the warm-up, between two synchronisations.

The first step is timed from the model's being ready. For one that finds nothing cached give each arm its own
TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR; Python's bytecode should be there all the same, as `pip install` leaves
it. Where packages came without (an archive, a folder that cannot be written), set PYTHONPYCACHEPREFIX and run
`python -m compileall` over them, else every process and every worker of the compiler compiles 2,900 files first.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
TARGETS_OF_LORAFIT = {"qv": "qv", "attention": "attention", "all": "all-linear"}
GIB = 1 << 30
EXAMPLES = 64  # in one step of the instruction-shaped work, as 4 × 16 or as one, unless lorafit is told otherwise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    add_base(verbs)
    run = verbs.add_parser("run")
    run.add_argument("arm")
    run.add_argument("folder")
    run.add_argument("--work", default="dense", choices=("dense", "real"))
    run.add_argument("--targets", default="qv", choices=tuple(TARGETS))
    run.add_argument("--rows", type=int, default=4, help="rows of one step (dense), or of the whole file (real)")
    run.add_argument("--length", type=int, default=2048, help="tokens of a dense row")
    run.add_argument("--examples", type=int, default=EXAMPLES, help="of lorafit: instruction rows in one step (real)")
    run.add_argument("--vram", type=float, default=0, help="budget in GiB")
    run.add_argument("--checkpointing", default="none", choices=("none", "full", "unsloth"), help="of the peers")
    run.add_argument("--compute", default="bf16", choices=("bf16", "fp8"), help="of lorafit")
    run.add_argument("--activations", default="auto", help="of lorafit")
    run.add_argument("--deterministic", action="store_true", help="of lorafit")
    run.add_argument("--dropout", type=float, default=0.0)
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of lorafit: one more setting")
    run.add_argument("--profile", default="", help="of lorafit: write its kernels' seconds after the warm-up here")
    run.add_argument("--steps", type=int, default=8)
    run.add_argument("--warm", type=int, default=3)
    table = verbs.add_parser("table")
    table.add_argument("folder")
    table.add_argument("out")
    table.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    {"base": make_base, "run": run_arm, "table": make_table}[options.verb](options)


def add_base(verbs: Any) -> None:
    """Add the command that makes a random base."""
    base = verbs.add_parser("base")
    base.add_argument("folder")
    base.add_argument("--size", default="8b", choices=("8b", "1b", "tiny"))


def make_base(options: argparse.Namespace) -> None:
    from make_random_base import make

    make(options.folder, options.size)


def run_arm(options: argparse.Namespace) -> None:
    if options.arm.startswith("unsloth"):
        import unsloth  # noqa: F401  # it must come before transformers
    import torch

    if options.vram and options.arm != "lorafit":  # lorafit enforces its own
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.vram * GIB / total)
    result = {name: getattr(options, name) for name in ("arm", "work", "targets", "rows", "length", "vram")}
    try:
        if options.arm == "lorafit":
            found = run_lorafit(options)
        elif options.work == "dense":
            from engine_peers import run_dense

            found = run_dense(options, TARGETS[options.targets])
        else:
            from engine_peers import run_real

            found = run_real(options, instruction_lengths(options.rows))
        result |= found
    except torch.OutOfMemoryError as error:
        result |= {"error": "out of memory", "message": str(error)[:120]}
    print(json.dumps(result))


def instruction_lengths(rows: int) -> list[tuple[int, int]]:
    """(prompt, response) tokens of instruction-shaped rows: lognormal, 8 to 240 each, mean 147 together."""
    import numpy as np

    random = np.random.default_rng(0)
    return [
        tuple(int(np.clip(random.lognormal(mean, spread), 8, 240)) for mean, spread in ((4.0, 0.6), (4.2, 0.8)))
        for _ in range(rows)
    ]


def run_lorafit(options: argparse.Namespace) -> dict[str, object]:
    """One training run through lorafit.train, over a JSONL whose rows have the lengths asked for."""
    import torch
    from transformers import TrainerCallback

    import lorafit
    from lorafit.api.observer import Observer

    marks: list[float] = []

    class Marks(TrainerCallback):
        ended = save_ms = 0.0
        kernels: object = None

        def on_step_begin(self, args: object, state: object, *_: object, **__: object) -> None:
            if options.profile and state.global_step == warm:  # type: ignore[attr-defined]
                self.kernels = start_profile()

        def on_save(self, *_: object, **__: object) -> None:
            self.save_ms = (time.perf_counter() - self.ended) * 1e3

        def on_step_end(self, args: object, state: object, *_: object, **__: object) -> None:
            if state.global_step in (1, warm, state.max_steps):  # type: ignore[attr-defined]
                torch.cuda.synchronize()
                marks.append(time.perf_counter())
                if self.kernels and state.global_step == state.max_steps:  # type: ignore[attr-defined]
                    write_profile(self.kernels, options.profile, state.max_steps - warm)  # type: ignore[attr-defined]
            self.ended = time.perf_counter()

    class Watch(Observer):
        attached_at = 0.0
        dry_run: object = None
        events: tuple[str, ...] = ()

        def on_event(self, event: object) -> None:
            self.events += (f"{event.kind}, step {event.step}",)  # type: ignore[attr-defined]

        def on_model(self, counts: object, base: str, rows: object) -> None:
            self.attached_at = time.perf_counter()

        def on_dry_run(self, dry_run: object) -> None:
            self.dry_run = dry_run

    warm = options.warm
    watch, timed = Watch(), Marks()
    with tempfile.TemporaryDirectory() as folder:
        examples = options.rows if options.work == "dense" else options.examples
        steps = options.steps + options.warm if options.work == "dense" else -(-options.rows // examples)
        data = write_rows(Path(folder) / "rows.jsonl", options, examples * steps)
        settings = {"gpu_memory": f"{options.vram}GiB"} if options.vram else {}
        if options.activations != "auto":
            settings["memory_policy"] = options.activations
        if options.deterministic:
            settings["deterministic"] = True
        settings |= dict(pair.split("=", 1) for pair in options.set)
        run = lorafit.train(
            data, options.folder, out=Path(folder) / "run", rank=16, alpha=32.0, dropout=options.dropout, holdout=0,
            targets=TARGETS_OF_LORAFIT[options.targets], compute=options.compute, epochs=1,
            quantization="nf4", examples_per_step=examples, save_steps=10_000, optimizer="adamw", ignore=("D", "P"),
            max_length=max(2048, options.length),
            callbacks=[timed], observer=watch, **settings,
        )  # fmt: skip
        losses = [json.loads(line)["loss"] for line in run.run.metrics.read_text().splitlines()]
    lengths = run.train_rows.lengths
    tokens = float(lengths.mean()) * examples
    seconds = (marks[-1] - marks[1]) / (run.steps - warm)
    dry_run = watch.dry_run
    return {
        "tokens_s": round(tokens / seconds),
        "step_ms": round(seconds * 1e3, 1),
        "tokens": round(tokens),
        "peak_gib": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "first_s": round(marks[0] - watch.attached_at, 1),
        "compile_s": round(dry_run.compile_s, 1) if dry_run else 0,
        "policy": str(dry_run.policy) if dry_run else "",
        "attempts": [f"{tried.policy}: {tried.peak_bytes / GIB:.2f} GiB" for tried in dry_run.attempts]
        if dry_run
        else [],
        "events": watch.events,
        "measure_s": round(dry_run.measure_s, 1) if dry_run else 0,
        "dry_run_s": round(dry_run.elapsed_s, 1) if dry_run else 0,
        "save_ms": round(timed.save_ms, 1),  # of the training thread, for the last step's checkpoint
        "compute": options.compute,
        "deterministic": options.deterministic,
        "set": options.set,
        "losses": [round(loss, 4) for loss in losses[:3]],
        "loss": round(run.loss, 4),
    }


def start_profile() -> object:
    from torch.profiler import ProfilerActivity, profile

    kernels = profile(activities=[ProfilerActivity.CUDA])
    kernels.start()
    return kernels


def write_profile(kernels: object, path: str, steps: int) -> None:
    """A line for each kernel, the longest first: milliseconds and calls of one step, microseconds a call, name."""
    kernels.stop()  # type: ignore[attr-defined]
    found = [event for event in kernels.key_averages() if event.self_device_time_total > 0]  # type: ignore[attr-defined]
    found.sort(key=lambda event: -event.self_device_time_total)
    lines = [f"{sum(event.self_device_time_total for event in found) / steps / 1e3:9.3f} ms of kernels a step"]
    for event in found:
        spent = event.self_device_time_total
        lines.append(
            f"{spent / steps / 1e3:9.3f} {event.count / steps:8.1f} {spent / event.count:9.1f}  {event.key[:160]}"
        )
    Path(path).write_text("\n".join(lines) + "\n")


def write_rows(path: Path, options: argparse.Namespace, count: int) -> Path:
    """Instruction rows of exact lengths: the base's tokenizer makes one token of each digit."""
    import random

    dice = random.Random(1)
    lengths = [(8, options.length - 8)] * count if options.work == "dense" else instruction_lengths(options.rows)
    wrapping = template_tokens(options.folder)

    def digits(amount: int) -> str:
        return "".join(dice.choice("0123456789") for _ in range(max(amount, 1)))

    with path.open("w") as file:
        for prompt, response in lengths:
            row = {"instruction": digits(prompt), "response": digits(response - wrapping)}
            file.write(json.dumps(row) + "\n")
    return path


def template_tokens(folder: str) -> int:
    """Tokens that the base's chat template adds to a row."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]) - 2


ROWS: list[tuple[str, list[str], list[list[str]]]] = [
    ("4 × 2,048, q/v, ≤ 8 GiB", ["--vram", "8"], [["unsloth", "--checkpointing", "unsloth"], ["lorafit"]]),
    ("4 × 2,048, q/v, ≤ 16 GiB", ["--vram", "16"], [["unsloth", "--checkpointing", "unsloth"], ["lorafit"]]),
    ("4 × 2,048, q/v, ≤ 24 GiB", ["--vram", "24"], [["unsloth", "--checkpointing", "unsloth"], ["lorafit"]]),
    ("4 × 2,048, q/v, ≤ 40 GiB", ["--vram", "40"], [["unsloth"], ["lorafit"]]),
    ("4 × 2,048, all-linear, ≤ 48 GiB", ["--vram", "48", "--targets", "all"], [["unsloth"], ["lorafit"]]),
    ("4 × 2,048, q/v, ≤ 16 GiB, fp8", ["--vram", "16"],
     [["unsloth", "--checkpointing", "unsloth"], ["lorafit", "--compute", "fp8"]]),
    ("4 × 2,048, q/v, ≤ 48 GiB, fp8", ["--vram", "48"], [["unsloth"], ["lorafit", "--compute", "fp8"]]),
    ("4 × 512, q/v", ["--length", "512"], [["unsloth"], ["lorafit"]]),
    ("1 × 2,048, q/v", ["--rows", "1"], [["unsloth"], ["lorafit"]]),
    ("instruction-shaped, 64 a step", ["--work", "real", "--rows", "1536"],
     [["padded", "--rows", "320"], ["trl_pack"], ["unsloth_pack"], ["lorafit"], ["lorafit", "--compute", "fp8"]]),
    ("smallest budget for 4 × 2,048, q/v", ["--vram", "6.0"], [["lorafit"]]),
]  # fmt: skip


def make_table(options: argparse.Namespace) -> None:
    """Run every row's arms, one process each; the last line of each is its JSON. Ratios are to the best peer."""
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = ["| work | arm | tokens/s | ratio to the best peer | peak GiB | first step s | setting |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, shared, arms in ROWS:
        if options.only not in name:
            continue
        results = [one_arm(options.folder, shared, arm) for arm in arms]
        best = max((found.get("tokens_s", 0) for found in results if found["arm"] != "lorafit"), default=0)
        for found in results:
            lines.append(table_line(name, found, best))
            print(lines[-1], flush=True)
        out.write_text("\n".join(lines) + "\n")


def one_arm(folder: str, shared: list[str], arm: list[str]) -> dict[str, object]:
    command = [sys.executable, __file__, "run", arm[0], folder, *shared, *arm[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"arm": arm[0], "error": (done.stderr.strip().splitlines() or ["no output"])[-1][:160]}


def table_line(name: str, found: dict[str, object], best: float) -> str:
    arm = f"{found['arm']} {found['compute']}" if found.get("compute") == "fp8" else found["arm"]
    if "error" in found:
        return f"| {name} | {arm} | {found['error']} | | | | |"
    ratio = f"{found['tokens_s'] / best:.2f}×" if best else ""
    setting = found.get("policy") or found.get("checkpointing", "")
    numbers = f"{found['tokens_s']:,} | {ratio} | {found['peak_gib']} | {found.get('first_s', '')}"
    return f"| {name} | {arm} | {numbers} | {setting} |"


if __name__ == "__main__":
    main()
