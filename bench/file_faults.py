"""The file campaign: let single file operations of each command fail, and see what it says and leaves behind.

`python bench/file_faults.py` counts the file operations of ten commands (plan, train, its resuming, chat, merge, two
exports, eval, check --fix, a server's start), and repeats each with one of them failing (a full disk, a read error).
The command must refuse in one sentence or end in the undisturbed result, and must end in it when it is asked again.
`--each N` chooses how many operations of each command fail, spread evenly; `--short` is one write and one read of three
commands. Needs a C compiler and Linux. Exit code 1 when a command fell over, or left something that stops it.
"""

import argparse
import contextlib
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from fault_runs import in_child
from fault_subjects import make_base, write_rows

from lorafit.api.load import load
from lorafit.api.merge import merge
from lorafit.api.plan import plan
from lorafit.api.ship.eval import eval as evaluate
from lorafit.api.ship.export import export
from lorafit.api.train import train
from lorafit.cli.app import _as_lorafit_error
from lorafit.config import resolve
from lorafit.data.fixing import fix_rows
from lorafit.errors import RunFinished
from lorafit.serve.engines import Limits
from lorafit.serve.http import ServerOptions
from lorafit.serve.launch import Keys, make_server

SHIM = Path(__file__).parent / "fault_shim.c"
WRITES, READS = ",create,write,fsync,rename,mkdir,truncate,chmod,", ",open,read,"
SETTINGS = {"max_steps": 2, "save_steps": 1, "holdout": 0.3, "examples_per_step": 4, "lr": 5e-3, "rank": 4}
QUESTION = "Route this ticket to a queue.\nThe courier lost my red lamp."
LONGEST_S = 90
Command = Callable[[Path], str | Path]


def trained(place: Path) -> Path:
    """Train, or go on with what an earlier attempt left."""
    with contextlib.suppress(RunFinished):
        train(place / "rows.jsonl", str(place / "base"), out=place / "run", **SETTINGS)
    return place / "run" / "adapter" / "adapter_model.safetensors"


def answered(place: Path) -> str:
    return load(place / "run").answer(QUESTION, max_new_tokens=4)


def merged(place: Path) -> Path:
    return merge(place / "run", onto="quantized", out=place / "merged").folder / "model.safetensors"


def exported(place: Path) -> Path:
    made = export(place / "run", to="adapter", out=place / "adapters", name="one", verify_in="none")
    return made.folder / "adapters" / "one" / "adapter_model.safetensors"


def as_gguf(place: Path) -> Path:
    export(place / "run", to="gguf", quantization="q8_0", out=place / "gguf")
    return place / "gguf" / "model-Q8_0.gguf"


def planned(place: Path) -> str:
    made = plan(place / "rows.jsonl", str(place / "base"), **SETTINGS)
    told = made.plan.to_dict()
    return repr([told["steps"], told["method"], told["fits"]])


def evaluated(place: Path) -> str:
    return repr(evaluate(place / "run", limit=2, max_new_tokens=2, out=place / "eval.json").to_dict()["metrics"])


def fixed(place: Path) -> Path:
    fix_rows(resolve(flags={"data": str(place / "rows.jsonl")}).config, place / "clean.jsonl")
    return place / "clean.jsonl"


def served(place: Path) -> str:
    server = make_server([place / "run"], Keys("k" * 16, "a" * 16), limits=Limits(2), options=ServerOptions())
    server.engine.stop(0)
    return "started"


COMMANDS: dict[str, Command] = {
    "train": trained, "chat": answered, "merge": merged, "export": exported, "eval": evaluated,
    "check --fix": fixed, "serve": served, "resume": trained, "gguf": as_gguf, "plan": planned,
}  # fmt: skip
STARTS = {"train": "rows", "check --fix": "rows", "plan": "rows", "resume": "half"}
"""What a command begins with: rows and a base, or half a run; any other a finished run."""
KINDS = {"writes": (WRITES, errno.ENOSPC), "reads": (READS, errno.EIO)}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def attempt(command: Command, place: Path, faults: dict[str, str]) -> tuple[int, str, str]:
    """Run `command` in a forked process under `faults`: (exit code, what it answered, what it said)."""
    log, answer = place.parent / "said.txt", place.parent / "answer.txt"
    for path in (log, answer):
        path.unlink(missing_ok=True)

    def work() -> None:
        torch.set_num_threads(1)  # a forked process makes its thread pool anew, before threads ask for it
        os.environ.update(faults)
        try:
            found = command(place)
        except Exception as error:
            raise _as_lorafit_error(error, []) from error  # as the command line tells it
        finally:
            os.environ.pop("SHIM_PREFIX", None)
        answer.write_text(_digest(found) if isinstance(found, Path) else found)

    code = in_child(work, log, kill_after_s=LONGEST_S)
    said = log.read_text(errors="replace") if log.exists() else ""
    return code, answer.read_text() if answer.exists() else "", said


def fresh(folder: Path, whole: Path) -> Path:
    """A copy of `whole` to harm, in a folder of its own."""
    return Path(shutil.copytree(whole, Path(tempfile.mkdtemp(dir=folder)) / "place"))


def operations(command: Command, place: Path, ops: str) -> tuple[int, str]:
    """How many operations of the kinds `ops` the undisturbed command makes, and its answer."""
    log = place.parent / "operations.txt"
    code, wanted, said = attempt(command, place, {"SHIM_PREFIX": str(place), "SHIM_OPS": ops, "SHIM_LOG": str(log)})
    assert code == 0, said
    return (len(log.read_text().splitlines()) if log.exists() else 0), wanted


def chosen(count: int, each: int) -> list[int]:
    """At most `each` of the numbers 1 to `count`, spread evenly."""
    return sorted({1 + round(place * (count - 1) / max(each - 1, 1)) for place in range(min(each, count))})


def campaign(folder: Path, whole: dict[str, Path], names: list[str], each: int) -> list[str]:
    """Print a row of the table for each command and kind; the failures in words."""
    failures = []
    for name in names:
        for kind, (ops, error) in KINDS.items():
            command, start = COMMANDS[name], whole[STARTS.get(name, "run")]
            count, wanted = operations(command, fresh(folder, start), ops)
            found: Counter[str] = Counter()
            for turn in chosen(count, each):
                place = fresh(folder, start)
                faults = {"SHIM_PREFIX": str(place), "SHIM_OPS": ops, "SHIM_ERRNO": str(int(error))}
                faults |= {"SHIM_FROM": str(turn), "SHIM_TO": str(turn)}
                code, answer, said = attempt(command, place, faults)
                outcome = "refused" if code in (1, 2) else "same" if code == 0 and answer == wanted else "wrong"
                again, answer, later = attempt(command, place, {}) if code else (0, wanted, "")
                resumes = again == 0 and answer == wanted
                found.update([outcome, "again" if resumes else "stuck"])
                if outcome == "wrong" or not resumes:
                    failures.append(
                        f"{name}, {kind} {turn} of {count}: exit {code}, then {again}: {(said + later)[-700:]}"
                    )
                shutil.rmtree(place.parent)
            tries = found["again"] + found["stuck"]
            cells = [name, kind, count, tries, found["refused"], found["same"], found["wrong"], found["again"]]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one operation of chat, merge and check --fix")
    parser.add_argument("--each", type=int, default=12, help="operations of each command and kind that fail")
    parser.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    given = parser.parse_args()
    if given.short:
        given.each, given.commands = 1, ["chat", "merge", "check --fix"]
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lorafit-files-") as name:
        folder = Path(name)
        os.environ["LORAFIT_CACHE"] = str(folder / "cache")
        whole = {"rows": folder / "rows", "run": folder / "run"}
        whole["rows"].mkdir()
        write_rows(whole["rows"] / "rows.jsonl")
        make_base(whole["rows"] / "base")
        shutil.copytree(whole["rows"], whole["run"])
        code, _, said = attempt(trained, whole["run"], {"SHIM_PREFIX": "/nowhere"})
        assert code == 0, said
        whole["half"] = Path(shutil.copytree(whole["run"], folder / "half"))
        shutil.rmtree(whole["half"] / "run" / "adapter")
        shutil.rmtree(max((whole["half"] / "run" / "checkpoints").glob("step-*")))
        print("| command | operations | of them | failed in turn | refused in one sentence | same result | wrong | "
              "same result when asked again |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|")
        failures = campaign(folder, whole, given.commands, given.each)
    print(*failures, f"{time.monotonic() - began:.0f} s", sep="\n")
    return 1 if failures else 0


def with_shim() -> int:
    """Compile the shim, and run this program under it."""
    with tempfile.TemporaryDirectory(prefix="lorafit-shim-") as name:
        library = Path(name) / "fault_shim.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-w", "-o", library, SHIM, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        return subprocess.run([sys.executable, *sys.argv], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main() if "fault_shim" in os.environ.get("LD_PRELOAD", "") else with_shim())
