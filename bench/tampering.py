"""The tampering campaign: change each file of a finished run, and see whether a command notices.

`python bench/tampering.py` flips bytes of every file at several offsets, cuts and empties it, puts a link, a pipe or
the file of another run in its place, and then trains, chats, merges, exports, evaluates and loads it to serve. Each
must refuse in one sentence,
or give the undisturbed result. `--short` is the form that the test suite runs: one offset and a link, `chat`'s and
`merge`'s checks without a model. Exit code 1 when a command took something up in silence or fell over.
"""

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fault_runs import in_child
from fault_subjects import make_base, write_rows

from lorafit.api.load import load
from lorafit.api.merge import merge, template_of, verification_rows
from lorafit.api.ship.eval import eval as evaluate
from lorafit.api.ship.export import export
from lorafit.api.train import train
from lorafit.errors import RunFinished
from lorafit.runs import RunDir, require_trained_run
from lorafit.serve.engines import Limits
from lorafit.serve.http import ServerOptions
from lorafit.serve.launch import Keys, make_server

OFFSETS = (0.0, 0.13, 0.37, 0.5, 0.71, 0.93, 1.0)
SETTINGS = {"max_steps": 4, "save_steps": 2, "holdout": 0.3, "examples_per_step": 4, "lr": 5e-3, "rank": 4}
QUESTION = "Route this ticket to a queue.\nThe courier lost my red lamp."
VERBS = ["train", "chat", "merge", "export", "eval", "serve"]


def flip(place: float) -> Callable[[Path, Path], None]:
    def harm(path: Path, victim: Path) -> None:
        content = bytearray(path.read_bytes())
        if content:
            content[min(int(place * len(content)), len(content) - 1)] ^= 1
        path.write_bytes(content)

    return harm


def cut(path: Path, victim: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def emptied(path: Path, victim: Path) -> None:
    path.write_bytes(b"")


def link(path: Path, victim: Path) -> None:
    path.unlink()
    path.symlink_to(victim)


def pipe(path: Path, victim: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def half(path: Path, victim: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def swapped(path: Path, victim: Path) -> None:
    """Put the file of another run, of another seed, in the place of this one."""
    run = next(parent for parent in path.parents if parent.name == "run")
    theirs = victim.parent / "other" / path.relative_to(run)
    if theirs.is_file():
        shutil.copyfile(theirs, path)


HARMS: dict[str, Callable[[Path, Path], None]] = {
    **{f"bit at {place:.0%}": flip(place) for place in OFFSETS},
    "cut": cut,
    "half": half,
    "swapped": swapped,
    "emptied": emptied,
    "link": link,
    "pipe": pipe,
}


class Commands:
    """What is asked of a tampered run, and the answer of the whole one. Each runs in a forked process."""

    def __init__(self, rows: Path, base: Path, *, short: bool) -> None:
        self.rows, self.base, self.short = rows, base, short

    def train(self, run: Path) -> str:
        with contextlib.suppress(RunFinished):
            train(self.rows, str(self.base), out=run, **SETTINGS)
        require_trained_run(RunDir(run))
        return _digest(run / "adapter" / "adapter_model.safetensors")

    def chat(self, run: Path) -> str:
        return load(run).answer(QUESTION, max_new_tokens=6)

    def merge(self, run: Path) -> str:
        if self.short:
            require_trained_run(RunDir.open(run))
            return repr([row.ids.tolist() for row in verification_rows(RunDir(run), template_of(RunDir(run)))])
        merged = merge(run, out=run.parent / "merged")
        assert merged.passed
        return _digest(merged.folder / "model.safetensors")

    def export(self, run: Path) -> str:
        made = export(run, to="adapter", out=run.parent / "adapters", name="one", verify_in="none")
        return _digest(made.folder / "adapters" / "one" / "adapter_model.safetensors")

    def eval(self, run: Path) -> str:
        return repr(evaluate(run, limit=2, max_new_tokens=2).to_dict()["metrics"])

    def serve(self, run: Path) -> str:
        server = make_server([run], Keys("k" * 16, "a" * 16), limits=Limits(2), options=ServerOptions())
        prompt = server.engine.base.template.prompt_ids([{"role": "user", "content": QUESTION}])
        answer = server.engine.answer(prompt, run.name, 6)
        server.engine.stop(0)
        return repr([prompt, answer])

    def all(self) -> dict[str, Callable[[Path], str]]:
        return {verb: getattr(self, verb) for verb in VERBS}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(command: Callable[[Path], str], run: Path, wanted: str) -> tuple[str, str]:
    """(detected, harmless, silent or crashed; what was said)."""
    log = run.parent / "output.txt"

    def work() -> None:
        found = command(run)
        (run.parent / "answer.txt").write_text(found)

    code = in_child(work, log, kill_after_s=60)
    said = log.read_text(errors="replace") if log.exists() else ""
    if code in (1, 2):
        return "detected", said
    if code != 0:
        return "crashed", said
    return ("harmless" if (run.parent / "answer.txt").read_text() == wanted else "silent"), said


def campaign(
    folder: Path, *, short: bool, verbs: list[str], hows: list[str]
) -> tuple[dict[str, Counter[str]], list[str]]:
    """By command, how often each outcome came; and the failures in words."""
    rows, base = write_rows(folder / "rows.jsonl"), make_base(folder / "base")
    whole = folder / "whole"
    for seed, run in enumerate((whole, folder / "other")):
        made = partial(train, rows, str(base), out=run, seed=seed, **SETTINGS)
        if in_child(lambda made=made: void(made()), folder / "train.txt") != 0:
            sys.exit((folder / "train.txt").read_text())
    victim = folder / "victim"
    victim.write_text("dear")
    commands = Commands(rows, base, short=short)
    counts: dict[str, Counter[str]] = {}
    failures: list[str] = []
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    with contextlib.suppress(KeyboardInterrupt):  # what was tried until then is a result too
        for verb in verbs:
            command = commands.all()[verb]
            counts[verb] = Counter()
            undisturbed = fresh(folder, whole)
            outcome(command, undisturbed, "")
            wanted = (undisturbed.parent / "answer.txt").read_text()
            for name in files:
                for how, harm in ((how, HARMS[how]) for how in hows):
                    run = fresh(folder, whole)
                    harm(run / name, victim)
                    kind, said = outcome(command, run, wanted)
                    counts[verb][kind] += 1
                    if kind in ("silent", "crashed") or victim.read_text() != "dear":
                        failures.append(f"{verb}, {name}, {how}: {kind}: {said[-300:]}")
                    victim.write_text("dear")
                    shutil.rmtree(run.parent)
    return counts, failures


def void(anything: object) -> None:
    """Drop a result."""


def fresh(folder: Path, whole: Path) -> Path:
    run = Path(tempfile.mkdtemp(dir=folder)) / "run"
    shutil.copytree(whole, run)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="the form that the test suite runs")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=VERBS)
    parser.add_argument("--harms", nargs="+", choices=list(HARMS), default=list(HARMS))
    given = parser.parse_args()
    if given.short:
        given.verbs, given.harms = ["merge"], ["bit at 50%", "link", "swapped"]
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lorafit-tampering-") as name:
        os.environ["LORAFIT_CACHE"] = str(Path(name) / "cache")
        counts, failures = campaign(Path(name), short=given.short, verbs=given.verbs, hows=given.harms)
    print("| command | tampered runs | refused in one sentence | the undisturbed result | in silence | fell over |")
    print("|---|---|---|---|---|---|")
    for verb, found in counts.items():
        cells = (found.total(), *(found[kind] for kind in ("detected", "harmless", "silent", "crashed")))
        print(f"| {verb} | " + " | ".join(map(str, cells)) + " |")
    print(*failures, f"{time.monotonic() - began:.0f} s", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
