"""Where a run goes: a new folder, or one whose run goes on. No torch."""

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
from lorafit.runs.run_dir import RunDir
from lorafit.runs.writing import RunLock

REJECTED = "rejected.jsonl"
ANEW = "pass --restart to start over (the old run is moved aside), or choose another --out"


class OtherRows(Exception):
    """A folder that nobody named holds a finished run of these settings over other rows. Never reaches a user."""


@dataclass(frozen=True, slots=True)
class RunTarget:
    """The folder of a run, and whether a run of the same settings is there already."""

    run: RunDir
    resumes: bool
    is_named: bool  # by --out

    def settled(self, resolved: Resolved) -> Resolved:
        """`resolved`, with what was planned when the run that goes on began.

        Layout may be planned anew, for the memory there is today, unless the last bits are asked for.
        """
        if not self.resumes:
            return resolved
        keys = set(PLANNED) if resolved.config.deterministic else set(PLANNED) - FREE
        return resolved.resuming(self.run.config(), keys)


def find_target(resolved: Resolved, *, restart: bool = False) -> RunTarget:
    """Where these settings train. Raises RunDirError when --out names a folder that holds another run or other files.

    Without --out it is runs/DATA-BASE, with -2, -3, … behind it: the first that holds a run of these settings, or is
    free. With `restart` the run that is there need not be of these settings: it will be moved aside. Raises RunDirError
    for a run that may be the one and is damaged: it is not passed over in silence.
    """
    if resolved.config.out:
        run = RunDir(Path(resolved.config.out))
        if not run.holds_run:
            run.refuse_if_taken()
        elif not restart:
            refuse_other_settings(run, resolved)
        return RunTarget(run, resumes=run.holds_run and not restart, is_named=True)
    for run in _candidates(resolved):
        if not run.holds_run and not run.foreign():
            break
        if run.holds_run and _is_alike(run, resolved, restart=restart):
            return RunTarget(run, resumes=not restart, is_named=False)
    return RunTarget(run, resumes=False, is_named=False)


def next_free(resolved: Resolved) -> RunDir:
    """The first of runs/DATA-BASE, -2, -3, … that holds nothing."""
    return next(run for run in _candidates(resolved) if not run.holds_run and not run.foreign())


def refuse_other_settings(run: RunDir, resolved: Resolved) -> None:
    """RunDirError, naming the setting and both its values, when the run in `run` was begun with others."""
    found = _differences(run, resolved)
    if found:
        raise _refusal(run, found)


def refuse_other_content(run: RunDir, config: RunConfig, then: RunFingerprint, now: RunFingerprint) -> None:
    """RunDirError, naming what differs and both values, when the run was trained from something else.

    `config` has the settings of today: one that chooses among the rows is named before the rows are.
    """
    found = then.differences(now)
    if found:
        raise _refusal(run, [*_other_choice(run.config(), config, then, now), *found])


def refuse_finished(run: RunDir) -> None:
    """RunFinished when the run has trained to its end."""
    if run.is_finished:
        raise RunFinished("this run has trained to its end, nothing is left to do", where=str(run.path), fix=ANEW)


def set_run_aside(run: RunDir) -> Path | None:
    """Move the run in `run` aside; where it is now, or None when there was none. RunDirError while it is training."""
    if not run.holds_run:
        return None
    with RunLock(run.path):
        return run.move_aside()


def restore_run(aside: Path | None, run: RunDir) -> None:
    """Undo `begin_anew`, where the run that was to take the place never began; its rejected rows stay to be read."""
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
    # what nobody sets is planned: the run that goes on has planned it already
    open_keys = {key for key in PLANNED if not resolved.is_set(key)}
    return [one for one in differing_settings(then, now) if one[0] not in open_keys]


def _other_choice(
    then: RunConfig, now: RunConfig, rows_then: RunFingerprint, rows_now: RunFingerprint
) -> list[tuple[str, str, str]]:
    """(key, then, now) of the settings by which the same files give other rows."""
    is_cut = "error" not in (then.on_long, now.on_long)  # else no row is longer than max_length
    holdout = ("holdout",) if rows_then.held_out_rows != rows_now.held_out_rows else ()
    trained = ("on_bad", "on_long", "field_map") if rows_then.train_rows != rows_now.train_rows else ()
    keys = (*holdout, *trained, *(("max_length",) if trained and is_cut else ()))
    return differing_settings({key: getattr(then, key) for key in keys}, {key: getattr(now, key) for key in keys})


def _is_alike(run: RunDir, resolved: Resolved, *, restart: bool) -> bool:
    """True for a run of these settings; its identity must be readable, unless the run will be moved aside."""
    try:
        if _differing(run, resolved):
            return False
    except LorafitError as error:
        raise RunDirError(
            f"the run here cannot be told from a new one ({error.what})",
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
        f"the {state} run here was begun with {what} = {then}, now it is {now}{more}", where=str(run.path), fix=ANEW
    )
