"""Lookup: the folder of a run, new or resumed. No torch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from lorafit.config import PLANNED, Resolved, RunConfig
from lorafit.errors import LorafitError, RunDirError, RunFinished
from lorafit.runs.identity import FREE, RunFingerprint, RunIdentity, differing_settings, held_settings
from lorafit.runs.own_files import refuse_planted
from lorafit.runs.run_dir import RunDir
from lorafit.runs.writing import RunLock

REJECTED = "rejected.jsonl"
RESTART_FIX = "pass --restart to start over (it moves the old run to another folder), or choose another --out"


class OtherRows(Exception):
    """An automatically chosen folder holds a finished run of these settings over other rows.

    It never reaches a user: the run goes to the next free folder.
    """


@dataclass(frozen=True, slots=True)
class RunTarget:
    """Hold the folder of a run.

    Attributes:
        run: The run directory.
        resumes: Whether it holds a run of the same settings, which resumes.
        is_named: Whether --out names it.
    """

    run: RunDir
    resumes: bool
    is_named: bool

    def settled(self, resolved: Resolved) -> Resolved:
        """Return `resolved` with the planned values of the resumed run.

        Settings of LAYOUT are planned again for today's memory, unless `deterministic` is set.
        """
        if not self.resumes:
            return resolved
        keys = set(PLANNED) if resolved.config.deterministic else set(PLANNED) - FREE
        return resolved.resuming(self.run.config(), keys)


def find_target(resolved: Resolved, *, restart: bool = False) -> RunTarget:
    """Return the folder in which these settings train.

    With --out it is that folder. Otherwise it is the first of runs/DATA-BASE, -2, -3, … that is free or holds a run of
    these settings. With `restart` an existing run may have other settings, because it is moved aside. Raises
    RunDirError when --out holds another run or other files. Raises RunDirError for a damaged run that may have these
    settings, instead of skipping it.
    """
    if resolved.config.out:
        run = RunDir(Path(resolved.config.out))
        refuse_planted(run.path, writes=True)
        if not run.holds_run:
            run.refuse_if_taken()
        elif not restart:
            refuse_other_settings(run, resolved)
        return RunTarget(run, resumes=run.holds_run and not restart, is_named=True)
    for run in _candidates(resolved):
        if not run.holds_run and not run.foreign():
            break
        if run.holds_run and _has_same_settings(run, resolved, restart=restart):
            return RunTarget(run, resumes=not restart, is_named=False)
    return RunTarget(run, resumes=False, is_named=False)


def next_free(resolved: Resolved) -> RunDir:
    """Return the first of runs/DATA-BASE, -2, -3, … that is free."""
    return next(run for run in _candidates(resolved) if not run.holds_run and not run.foreign())


def refuse_other_settings(run: RunDir, resolved: Resolved) -> None:
    """Raise RunDirError when the run in `run` was started with other settings.

    The message names the setting and both values.
    """
    found = _differences(run, resolved)
    if found:
        raise _refusal(run, found)


def refuse_other_content(run: RunDir, config: RunConfig, then: RunFingerprint, now: RunFingerprint) -> None:
    """Raise RunDirError when the run was trained from other content.

    The message names the difference and both values. `config` holds today's settings: a changed setting that selects
    rows is named before the rows.
    """
    found = then.differences(now)
    if found:
        raise _refusal(run, [*_row_settings_that_differ(run.config(), config, then, now), *found])


def refuse_finished(run: RunDir) -> None:
    """Raise RunFinished when the run is complete."""
    if run.is_finished:
        raise RunFinished("this run is complete, so nothing is left to train", where=str(run.path), fix=RESTART_FIX)


def set_run_aside(run: RunDir) -> Path | None:
    """Move the run in `run` aside and return its new folder; None without a run.

    Raises RunDirError while the run is training.
    """
    if not run.holds_run:
        return None
    with RunLock(run.path):
        return run.move_aside()


def restore_run(aside: Path | None, run: RunDir) -> None:
    """Undo `set_run_aside` when the new run never started. The new run's rejected rows are kept."""
    if aside is None or run.holds_run:
        return
    rejected = run.path / REJECTED
    if rejected.exists() and not (aside / REJECTED).exists():
        rejected.rename(aside / REJECTED)
    shutil.rmtree(run.path, ignore_errors=True)
    aside.rename(run.path)


def _candidates(resolved: Resolved) -> Iterator[RunDir]:
    stems = f"{Path(resolved.config.data[0]).stem}-{Path(resolved.config.base).name}"
    name = re.sub(r"[^\w.-]+", "-", stems).strip("-")
    for number in count(1):
        yield RunDir(Path("runs") / (name if number == 1 else f"{name}-{number}"))


def _differences(run: RunDir, resolved: Resolved) -> list[tuple[str, str, str]]:
    RunIdentity.read(run.identity)  # without it nothing can be compared
    return _differing(run, resolved)


def _differing(run: RunDir, resolved: Resolved) -> list[tuple[str, str, str]]:
    then, now = held_settings(run.config()), held_settings(resolved.config)
    # settings that nobody sets are planned, and the resumed run has planned them already
    open_keys = {key for key in PLANNED if not resolved.is_set(key)}
    return [difference for difference in differing_settings(then, now) if difference[0] not in open_keys]


def _row_settings_that_differ(
    then: RunConfig, now: RunConfig, rows_then: RunFingerprint, rows_now: RunFingerprint
) -> list[tuple[str, str, str]]:
    """Return (key, then, now) of the changed settings that select other rows."""
    is_cut = "error" not in (then.on_long, now.on_long)  # otherwise no row is longer than max_length
    holdout = ("holdout",) if rows_then.held_out_rows != rows_now.held_out_rows else ()
    trained = ("on_bad", "on_long", "field_map") if rows_then.train_rows != rows_now.train_rows else ()
    keys = (*holdout, *trained, *(("max_length",) if trained and is_cut else ()))
    return differing_settings({key: getattr(then, key) for key in keys}, {key: getattr(now, key) for key in keys})


def _has_same_settings(run: RunDir, resolved: Resolved, *, restart: bool) -> bool:
    """Return True for a run of these settings.

    Its identity must be readable, unless `restart` will move the run aside.
    """
    refuse_planted(run.path, writes=True)
    try:
        if _differing(run, resolved):
            return False
    except LorafitError as error:
        raise RunDirError(
            f"the settings of this run cannot be compared ({error.what})",
            where=str(run.path),
            fix="choose another --out",
        ) from error
    if not restart:
        RunIdentity.read(run.identity)
    return True


def _refusal(run: RunDir, found: list[tuple[str, str, str]]) -> RunDirError:
    what, then, now = found[0]
    more = f" (and {', '.join(name for name, _, _ in found[1:])})" if len(found) > 1 else ""
    state = "finished" if run.is_finished else "unfinished"
    return RunDirError(
        f"the {state} run in this folder was started with {what} = {then}, now it is {now}{more}",
        where=str(run.path),
        fix=RESTART_FIX,
    )
