"""Resume: the checkpoint that a stopped run goes on from, and what is said when a signal ends it."""

from __future__ import annotations

import filecmp
import shlex
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorafit.api.manifest import environment
from lorafit.config import RunConfig
from lorafit.engine import Rehearsal
from lorafit.errors import RunDirError, TrainingStopped
from lorafit.runs import LAYOUT, RunDir, RunFingerprint, RunIdentity, adapter_hashes, changed_file, differing_settings
from lorafit.runs.lookup import OtherRows, Place, refuse_finished, refuse_other_content
from lorafit.training import (
    ADAPTER,
    Checkpoint,
    EventLog,
    TrainingLoop,
    TunedMemory,
    clear_unfinished,
    newest_whole,
    set_aside,
)

HELD_OUT_TOKENS = "micro_tokens of evaluations"


def known_identity(place: Place, config: RunConfig, now: RunFingerprint) -> RunIdentity:
    """The identity of the run in `place`, if `now`, by the settings `config`, is what it is trained from.

    Raises RunDirError naming what differs, OtherRows for a finished run over other rows in a folder that nobody named.
    """
    run, identity = place.run, RunIdentity.read(place.run.identity)
    if run.is_finished and not place.is_named and identity.fingerprint.differences(now):
        raise OtherRows
    refuse_other_content(run, config, identity.fingerprint, now)
    return identity


def refuse_at_end(run: RunDir, identity: RunIdentity) -> None:
    """RunFinished when the run has trained to its end, and its adapter is the one that was saved."""
    if run.is_finished and _is_whole(run, identity):
        refuse_finished(run)


def resume_from(run: RunDir, identity: RunIdentity, layout: Mapping[str, Any], events: EventLog) -> Checkpoint | None:
    """The checkpoint the run in `run` goes on from, None for its very beginning; every one passed over is an event.

    `layout` is how it will run now, as `layout_of` has it.
    """
    clear_unfinished(run.checkpoints)
    if run.adapter.exists():
        events.record("adapter_damaged", 0, "the adapter here is not the one that was trained: it is written again")
    checkpoint, damaged = newest_whole(run.checkpoints, identity.run)
    for one in damaged:
        events.record("checkpoint_damaged", one.step, f"{one.folder.name} is passed over: {one.reason}")
    try:
        set_aside(damaged)
    except OSError as error:
        raise RunDirError(
            f"a damaged checkpoint cannot be renamed ({error.strerror})", where=str(run.checkpoints), fix="remove it"
        ) from error
    if checkpoint is None:
        events.record("resumed", 0, "there is no whole checkpoint yet: the run begins again at its first step")
    else:
        events.record("resumed", checkpoint.step, f"the run goes on from {checkpoint.folder.name}")
    _note_changes(run, identity, layout, checkpoint, events)
    return checkpoint


def layout_of(config: RunConfig, memory: TunedMemory, rehearsal: Rehearsal | None) -> dict[str, Any]:
    """Return what of a run's layout its last bits depend on, as JSON values.

    On a GPU the policy that was tried counts, whatever the settings say: a resumed run keeps it.
    """
    tokens = memory.micro_tokens
    layout = {key: getattr(config, key) for key in LAYOUT if key != "max_length"}
    if rehearsal is not None:
        del layout["memory_policy"]
        layout["policy"] = str(replace(rehearsal.policy, micro_tokens=None))
    return {**layout, "micro_tokens": tokens, HELD_OUT_TOKENS: min(tokens, config.max_length)}


def _note_changes(
    run: RunDir, identity: RunIdentity, layout: Mapping[str, Any], checkpoint: Checkpoint | None, events: EventLog
) -> None:
    """An event when the run goes on elsewhere, or in another layout, than it began."""
    settings = run.config().model_dump(mode="json")
    began = {key: settings.get(key, value) for key, value in layout.items()} | dict(identity.environment)
    now = {**layout, **environment()}
    if checkpoint is not None:  # whose micro-batches are not outgrown
        for key in ("micro_tokens", HELD_OUT_TOKENS):
            now[key] = min(now[key], began["micro_tokens"])
    changed = differing_settings(began, now)
    step = checkpoint.step if checkpoint else 0
    if changed:
        words = ", ".join(f"{what} was {before} and is {after}" for what, before, after in changed)
        message = f"the run goes on in another way than it began, so its last bits may differ: {words}"
        events.record("environment_changed", step, message)


def _is_whole(run: RunDir, identity: RunIdentity) -> bool:
    """False when the adapter of a finished run is not the one that was saved.

    A run that kept no hashes is compared with its last checkpoint, where that is there.
    """
    if identity.adapter:
        return changed_file(run.adapter, identity.adapter) is None
    checkpoint, _ = newest_whole(run.checkpoints, identity.run)
    if checkpoint is None or not checkpoint.is_last:
        return True
    saved = checkpoint.folder / ADAPTER
    names = [path.name for path in saved.iterdir()]
    same, _, _ = filecmp.cmpfiles(saved, run.adapter, names, shallow=False)
    return sorted(same) == sorted(names)


def save_result(run: RunDir, identity: RunIdentity, loop: TrainingLoop) -> None:
    """Write the trained weights, their hashes first. RunDirError, saying how to go on, when the disk refuses."""

    def keep_hashes(staged: Path) -> None:
        # before the weights are there: a kill in between leaves some that are refused, never some that nobody checks
        run.write_json(run.identity, identity.ended_in(adapter_hashes(staged)).to_dict())

    try:
        loop.method.save(loop.model, run.adapter, loop.config, written=keep_hashes)
    except RunDirError as error:
        fix = f"free some space and go on with: {command_to_resume(run)}"
        raise RunDirError(f"the trained adapter: {error.what}", where=error.where, fix=fix) from error


def refuse_stopped(run: RunDir, loop: TrainingLoop) -> None:
    """TrainingStopped when a signal ended the run before its last step; it says how to go on."""
    stop, step, steps = loop.signals.stop, loop.state.global_step, loop.arguments.max_steps
    if stop is None or (step >= steps and not loop.owes_evaluation):
        return
    newest = loop.checkpoints.newest()
    kept = f"the newest checkpoint is {newest.name}" if newest else "no checkpoint could be written"
    raise TrainingStopped(
        stop,
        f"{signal.Signals(stop).name} after step {step} of {steps}; {kept}",
        where=str(run.path),
        fix=f"go on with: {command_to_resume(run)}",
    )


def command_to_resume(run: RunDir) -> str:
    """The command that goes on with the run, whatever command began it."""
    return shlex.join(["lorafit", "train", str(run.settings), "--out", str(run.path)])
