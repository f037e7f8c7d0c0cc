"""The fault campaign: kill, damage, fill, block and poison runs, and see whether they end in the same bits.

`python bench/faults.py` prints the figures of docs/internals/checkpoints.md (about ten minutes on one core); `--short`
is the form that the test suite runs, `--alone` leaves the Trainer out. A parent process imports everything once and
forks the runs it kills. Exit code 1 when lorafit lost anything.
"""

import argparse
import contextlib
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from fault_injection import (
    DAMAGES,
    At,
    block_folder,
    damage,
    empty_disk,
    fill_disk,
    kill,
    kill_at_operation,
    kill_within,
    lift_limit,
    limit_file_size,
    make_a_spike,
    pause,
    run_out_of_memory,
    send,
    send_in_evaluation,
    spoil_gradient,
    turn_clock,
    unblock_folder,
)
from fault_runs import Campaign, Row, attempt, be_the_child, ends_as, in_child, reference, small_disk, table, versions
from fault_subjects import STEPS, Lorafit, Subject, Transformers, adapter_is_finite, make_base, write_rows

# ---- kills


def random_kills(
    campaign: Campaign, subject: Subject, wanted: dict[str, str], runs: int, each: int, variant: str = ""
) -> None:
    """Each run is killed `each` times: at random moments, right after a step, and while a checkpoint is written."""
    row = campaign.row(f"runs killed at random moments, a third of them while saving{variant}", subject)
    lost = 0
    for _ in range(runs):
        folder = campaign.fresh()
        for _ in range(each):
            last = _last_step(subject, folder)
            resumes = len(subject.resumed_at(folder))
            _one_kill(campaign, subject, folder, last)
            lost += sum(last - step for step in subject.resumed_at(folder)[resumes:])
        survived, identical = ends_as(subject, folder, wanted)
        row.add(survived=survived, identical=identical)
    row.note = f"{runs * each} kills over {runs} runs"
    if isinstance(subject, Lorafit):
        row.note += f", {lost} steps lost beyond the newest checkpoint"
        row.survived = row.survived if lost == 0 else 0


def kills_at_operations(campaign: Campaign, subject: Lorafit) -> None:
    """A run of three steps is killed before its first operation on a file, before its second, and so on to its last."""
    short = replace(subject, settings={"max_steps": 3, "eval_steps": 2, "keep_last": 1})
    wanted, counted = reference(campaign, short), campaign.fresh()
    log = counted.parent / "output.txt"
    in_child(lambda: _until_operation(short, counted, 0), log)
    total = int(log.read_text().rpartition("operations ")[2])
    row = campaign.row("killed before every single operation on a file", subject)
    for number in range(1, total + 1):
        folder = campaign.fresh()
        campaign.kills += 1
        ended = in_child(lambda at=folder, n=number: _until_operation(short, at, n), folder.parent / "output.txt")
        survived, identical = ends_as(short, folder, wanted)
        row.add(survived=survived and ended == -signal.SIGKILL, identical=identical)


def _until_operation(subject: Subject, folder: Path, number: int) -> None:
    count = kill_at_operation(folder, number)
    subject.train(folder, [])
    print(f"operations {count[0]}")


def _one_kill(campaign: Campaign, subject: Subject, folder: Path, done: int) -> None:
    draw = campaign.draw
    step = min(STEPS, done + draw.randrange(1, 4))
    way = draw.randrange(3)
    campaign.kills += 1
    if way == 0:
        attempt(subject, folder, kill_after_s=draw.uniform(0.0, campaign.seconds[subject.name]))
    elif way == 1:
        attempt(subject, folder, At(step, kill))
    else:
        moment = "train_end" if step == STEPS and draw.random() < 0.5 else "save"  # then the adapter is being written
        attempt(subject, folder, At(step, kill_within(draw.uniform(0.0, 0.08)), when=moment))


def _last_step(subject: Subject, folder: Path) -> int:
    found = subject.checkpoints(folder) if folder.exists() else []
    return int(found[-1].name.rpartition("-")[2]) if found else 0


# ---- damaged checkpoints


def damaged_checkpoints(campaign: Campaign, subject: Subject, wanted: dict[str, str]) -> None:
    """Every file of the newest checkpoint in every way, one at a time; then all checkpoints at once."""
    stopped = campaign.fresh()
    attempt(subject, stopped, At(8, kill, when="end"))
    files = [path for path in sorted(subject.checkpoints(stopped)[-1].rglob("*")) if path.is_file()]
    names = [str(path.relative_to(subject.checkpoints(stopped)[-1])) for path in files]
    for how in DAMAGES[-2:] if campaign.short else DAMAGES:
        row = campaign.row(f"newest checkpoint, each file {how}", subject)
        for name in names[:2] if campaign.short else names:
            folder = _copied(campaign, stopped)
            damage(subject.checkpoints(folder)[-1] / name, how, campaign.draw)
            _resume_damaged(row, subject, folder, wanted)
    row = campaign.row("all checkpoints damaged", subject)
    folder = _copied(campaign, stopped)
    for checkpoint in subject.checkpoints(folder):
        damage(next(checkpoint.rglob("*.safetensors")), "truncated", campaign.draw)
    _resume_damaged(row, subject, folder, wanted)


def damaged_result(campaign: Campaign, subject: Subject, wanted: dict[str, str]) -> None:
    """The adapter of a finished run, damaged; the same command again must mend it, not call it finished."""
    row = campaign.row("adapter of a finished run damaged", subject)
    finished = campaign.fresh()
    attempt(subject, finished)
    for how in DAMAGES[-1:] if campaign.short else DAMAGES:
        folder = _copied(campaign, finished)
        damage(folder / "adapter" / "adapter_model.safetensors", how, campaign.draw)
        survived, identical = ends_as(subject, folder, wanted)
        row.add(survived=survived, identical=identical)


def _copied(campaign: Campaign, stopped: Path) -> Path:
    folder = campaign.fresh()
    shutil.copytree(stopped, folder)
    return folder


def _resume_damaged(row: Row, subject: Subject, folder: Path, wanted: dict[str, str]) -> None:
    code = attempt(subject, folder)
    survived = code == 0
    # an error is a detection too, if it is not about our own bench
    detected = "checkpoint_damaged" in subject.said(folder) or not survived
    row.add(survived=survived, detected=detected, identical=survived and subject.result(folder) == wanted)


# ---- disks


def disks(campaign: Campaign, subject: Subject, wanted: dict[str, str]) -> None:
    """Files that may not grow, a folder that refuses, a disk that is full: for a few steps, or to the end."""
    windows = ((5, 9),) if campaign.short else ((2, 4), (5, 9), (7, 11))
    row = campaign.row("files may not grow (RLIMIT_FSIZE) for a few steps", subject)
    for first, until in windows:
        harm = At(first, limit_file_size(20_000), until=until, mend=lift_limit)
        _refused(row, subject, campaign.fresh(), harm, wanted)
    row = campaign.row("checkpoint folder cannot be written for a few steps", subject)
    for first, until in windows:
        folder = campaign.fresh()
        blocked = folder / "checkpoints" if isinstance(subject, Lorafit) else folder
        harm = At(first, block_folder(blocked), until=until, mend=unblock_folder(blocked))
        _refused(row, subject, folder, harm, wanted)
    with small_disk(campaign) as disk:
        if disk is not None:
            _full_disks(campaign, subject, wanted, disk, windows)


def _full_disks(
    campaign: Campaign, subject: Subject, wanted: dict[str, str], disk: Path, windows: tuple[tuple[int, int], ...]
) -> None:
    row = campaign.row("disk full to the last byte for a few steps", subject)
    for first, until in windows:
        folder = Path(tempfile.mkdtemp(dir=disk)) / "run"
        harm = At(first, fill_disk(disk), until=until, mend=empty_disk(disk))
        _refused(row, subject, folder, harm, wanted, disk)
        shutil.rmtree(folder.parent)
    row = campaign.row("disk full to the end; emptied, then the same command", subject)
    folder = Path(tempfile.mkdtemp(dir=disk)) / "run"
    code = attempt(subject, folder, At(7, fill_disk(disk)))
    _undo(folder, disk)
    survived, identical = ends_as(subject, folder, wanted)
    row.add(survived=survived, detected=code != 0, identical=identical)


def _refused(
    row: Row, subject: Subject, folder: Path, harm: At, wanted: dict[str, str], disk: Path | None = None
) -> None:
    survived = attempt(subject, folder, harm) == 0
    if not survived:
        _undo(folder, disk)
        _, identical = ends_as(subject, folder, wanted)
    else:
        identical = subject.result(folder) == wanted
    detected = "checkpoint_failed" in subject.said(folder) or not survived
    row.add(survived=survived, detected=detected, identical=identical)


def _undo(folder: Path, disk: Path | None) -> None:
    if disk is not None:
        (disk / "filler").unlink(missing_ok=True)
    for path in (folder, folder / "checkpoints"):
        if path.is_file():
            unblock_folder(path)(None)


# ---- two writers, other data


def two_writers(campaign: Campaign, subject: Subject, wanted: dict[str, str]) -> None:
    """A second process on a run that is under way."""
    row = campaign.row("a second process on the same run", subject)
    folder = campaign.fresh()
    first = os.fork()
    if first == 0:
        be_the_child(lambda: subject.train(folder, [At(3, pause(2.5))]), folder.parent / "first.txt")
    until = time.monotonic() + 60
    while len(subject.checkpoints(folder) if folder.exists() else []) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    second = attempt(subject, folder)
    _, status = os.waitpid(first, 0)
    survived = os.waitstatus_to_exitcode(status) == 0
    row.add(survived=survived, detected=second != 0, identical=survived and subject.result(folder) == wanted)


def other_rows(campaign: Campaign, subject: Subject) -> None:
    """A stopped run, and a finished one, are asked to go on with other rows: they must refuse."""
    other = subject.with_rows(write_rows(campaign.folder / "other.jsonl", seed=1))
    for state, at in (("stopped", [At(6, kill)]), ("finished", [])):
        row = campaign.row(f"other rows for a {state} run", subject)
        folder = campaign.fresh()
        attempt(subject, folder, *at)
        row.add(survived=True, detected=attempt(other, folder) != 0)
    row = campaign.row("another learning rate for a stopped run", subject)
    folder = campaign.fresh()
    attempt(subject, folder, At(6, kill))
    row.add(survived=True, detected=attempt(subject.with_rate(1e-3), folder) != 0)


# ---- numbers, memory, clock


def bad_numbers(campaign: Campaign, subject: Subject) -> None:
    """One step's gradient becomes NaN, or infinite."""
    for name, value in (("NaN", float("nan")), ("infinite", float("inf"))):
        # "same bits" there: as the same poisoned run, killed and resumed
        row = campaign.row(f"a gradient becomes {name}", subject)
        for _ in range(5):
            folder, step = campaign.fresh(), campaign.draw.randrange(2, STEPS - 2)
            survived = attempt(subject, folder, At(step, spoil_gradient(value), when="begin")) == 0
            survived = survived and adapter_is_finite(folder)
            detected = "non_finite" in subject.said(folder)
            same = survived and _replayed(campaign, subject, folder, step, value)
            row.add(survived=survived, detected=detected, identical=same)


def _replayed(campaign: Campaign, subject: Subject, folder: Path, step: int, value: float) -> bool:
    """Whether the same poisoned run, killed once the poisoned step is saved and resumed, ends in the same bits."""
    again = campaign.fresh()
    attempt(subject, again, At(step, spoil_gradient(value), when="begin"), At(step + 2, kill))
    return attempt(subject, again) == 0 and subject.result(again) == subject.result(folder)


def spikes(campaign: Campaign, subject: Lorafit | Transformers) -> None:
    """The loss of one step jumps."""
    row = campaign.row("the loss of one step jumps", subject)
    longer = (
        replace(subject, settings={**subject.settings, "max_steps": 24}) if isinstance(subject, Lorafit) else subject
    )
    folder = campaign.fresh()
    step = 20 if isinstance(subject, Lorafit) else 10
    survived = attempt(longer, folder, At(step, make_a_spike, when="begin")) == 0
    row.add(survived=survived, detected="spike" in subject.said(folder))


def memory(campaign: Campaign, subject: Subject) -> None:
    """One micro-batch does not fit."""
    row = campaign.row("out of memory in one micro-batch", subject)
    for _ in range(5):
        folder, step = campaign.fresh(), campaign.draw.randrange(2, STEPS)
        survived = attempt(subject, folder, At(step, run_out_of_memory(1), when="begin")) == 0
        row.add(survived=survived, detected="out_of_memory" in subject.said(folder) or not survived)
    if isinstance(subject, Lorafit):
        row.note = "retried in smaller micro-batches: the same examples and loss, summed in another order"


def clock(campaign: Campaign, subject: Subject, wanted: dict[str, str]) -> None:
    """The wall clock jumps by a day while the run goes on."""
    row = campaign.row("the clock jumps a day, forwards and back", subject)
    for seconds in (-86_400.0,) if campaign.short else (86_400.0, -86_400.0):
        folder = campaign.fresh()
        survived = attempt(subject, folder, At(4, turn_clock(seconds))) == 0
        row.add(survived=survived, identical=survived and subject.result(folder) == wanted)


# ---- signals


def signals(campaign: Campaign, subject: Subject, wanted: dict[str, str]) -> None:
    """SIGTERM in a step, in an evaluation, and while a checkpoint is written; SIGINT; SIGUSR1."""
    term = signal.SIGTERM
    cases = [
        ("SIGTERM in a step", At(5, send(term), when="begin"), 143),
        ("SIGTERM in an evaluation", At(6, send_in_evaluation(term), when="end"), 143),
        ("SIGTERM while saving", At(5, send(term), when="save"), 143),
        ("SIGINT in a step", At(5, send(signal.SIGINT), when="begin"), 130),
    ]
    for fault, harm, wanted_code in cases[1:2] if campaign.short else cases:
        row = campaign.row(f"{fault}, then resume", subject)
        folder = campaign.fresh()
        began = time.monotonic()
        code = attempt(subject, folder, harm)
        row.note = f"exit code {code} after {time.monotonic() - began:.1f} s"
        _, identical = ends_as(subject, folder, wanted)
        row.add(survived=code == wanted_code, identical=identical)


# ---- the whole


def campaign_of(campaign: Campaign, subject: Subject, *, runs: int, each: int) -> None:
    """Everything for one subject."""
    wanted = reference(campaign, subject)
    random_kills(campaign, subject, wanted, runs, each)
    damaged_checkpoints(campaign, subject, wanted)
    damaged_result(campaign, subject, wanted)
    disks(campaign, subject, wanted)
    clock(campaign, subject, wanted)
    signals(campaign, subject, wanted)
    if campaign.short:  # tests of their own hold the rest for each commit
        return
    two_writers(campaign, subject, wanted)
    other_rows(campaign, subject)
    bad_numbers(campaign, subject)
    spikes(campaign, subject)
    memory(campaign, subject)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="the form that the test suite runs")
    parser.add_argument("--alone", action="store_true", help="without transformers' Trainer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lorafit-faults-") as name:
        folder = Path(name)
        os.environ["LORAFIT_CACHE"] = str(folder / "cache")
        campaign = Campaign(folder, random.Random(given.seed), given.short)
        rows, base = write_rows(folder / "rows.jsonl"), make_base(folder / "base")
        gc.freeze()  # forked children need not look through what the parent has imported
        with contextlib.suppress(KeyboardInterrupt):  # what was tried until then is a result too
            run(campaign, rows, base, alone=given.alone)
    print(table(campaign.rows))
    ours = [row for row in campaign.rows if row.subject == "lorafit"]
    print(f"\n{campaign.kills} kills, {time.monotonic() - began:.0f} s, seed {given.seed}; {versions()}")
    return 0 if all(row.is_clean for row in ours) else 1


def run(campaign: Campaign, rows: Path, base: Path, *, alone: bool) -> None:
    """lorafit's whole campaign, its kills in further settings, and the Trainer's."""
    subject = Lorafit(rows, base)
    if campaign.short:
        campaign_of(campaign, subject, runs=1, each=4)
        return
    campaign_of(campaign, subject, runs=11, each=12)
    kills_at_operations(campaign, subject)
    for name, settings in VARIANTS.items():
        variant = Lorafit(rows, base, settings)
        random_kills(campaign, variant, reference(campaign, variant), 6, 9, f"; {name}")
    if not alone:
        campaign_of(campaign, Transformers(rows, base), runs=8, each=6)


VARIANTS = {
    "base not quantised, saving every 2nd step": {"quantization": "none", "save_steps": 2, "max_length": 128},
    "gradients recomputed, all linears": {"memory_policy": "recompute", "targets": "all-linear", "rank": 8},
}

if __name__ == "__main__":
    sys.exit(main())
