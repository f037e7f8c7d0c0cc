"""manifest: the files that describe a run in its directory, and how a run resumes."""

from __future__ import annotations

import filecmp
import json
import shlex
import signal
import uuid
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lorafit import __version__
from lorafit.api.plan import PlannedRun
from lorafit.backbone import base_fingerprint
from lorafit.config import Resolved, RunConfig, base_folder
from lorafit.data import Prepared, Record, Template
from lorafit.data.checks.whole_set import write_split
from lorafit.engine import DryRun
from lorafit.errors import AdapterError, RunDirError, TrainingStopped
from lorafit.export import result_hashes, write_adapter_companions
from lorafit.findings import Finding
from lorafit.methods.full import WeightsSnapshot
from lorafit.methods.full.sharding import is_sharded
from lorafit.objectives import OBJECTIVES
from lorafit.plugins import OBJECTIVES as PLUGINS
from lorafit.plugins import plugin_release
from lorafit.runs import (
    ADAPTER,
    LAYOUT,
    Checkpoint,
    InitialAdapter,
    RunDir,
    RunFingerprint,
    RunIdentity,
    RunLock,
    changed_file,
    clear_unfinished,
    differing_settings,
    held_settings,
    newest_whole,
    set_aside,
    write_text,
)
from lorafit.runs.identity import PROCESSES
from lorafit.runs.lookup import OtherRows, RunTarget, refuse_finished, refuse_other_content
from lorafit.training import EventLog, TrainingLoop, TunedMemory

SAMPLE_ROWS = 256  # held-out rows kept in the run directory, which merge verifies on
FEW_ROWS = 16  # with fewer held-out rows, training rows are kept too
HELD_OUT_TOKENS = "micro_tokens of evaluations"


def fingerprint_of(config: RunConfig, template: Template, prepared: Prepared) -> RunFingerprint:
    """Return the fingerprint of settings, rows, template and base.

    `config` has the plan's values filled in.
    """
    return RunFingerprint(
        train_rows=prepared.train.content_hash,
        held_out_rows=prepared.holdout.content_hash,
        template=template.sha256,
        base=base_fingerprint(base_folder(config.base, config.revision, weights=True)),
        settings=held_settings(config),
        init_adapter=InitialAdapter.open(config.init_adapter).content_hash if config.init_adapter else "",
    )


def new_run_id() -> str:
    """Return a fresh id."""
    return uuid.uuid4().hex


def environment(config: RunConfig | None = None) -> dict[str, Any]:
    """Return the environment that decides the last bits of a run: versions, plug-in, device and CPU threads."""
    on_gpu = torch.cuda.is_available()
    here: dict[str, Any] = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    here["lorafit"] = __version__  # a checkout on PYTHONPATH has no installed version
    if config is not None and config.objective not in OBJECTIVES:
        here["objective"] = plugin_release(PLUGINS, config.objective)
    here["device"] = torch.cuda.get_device_name() if on_gpu else f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    return here if on_gpu else here | {"threads": torch.get_num_threads()}


@dataclass(frozen=True)
class Manifest:
    """Hold a run that is read, judged and planned, and write its description.

    Attributes:
        run: the run directory, which `lock` holds.
        lock: the lock on the run directory.
        run_id: the id that its checkpoints carry.
        known: the identity of a resumed run; None for a new one.
        planned: the plan, the settings and the data.
        template: the chat template.
        findings: the findings so far.
    """

    run: RunDir
    lock: RunLock
    run_id: str
    known: RunIdentity | None
    planned: PlannedRun
    template: Template
    findings: list[Finding]

    @property
    def resolved(self) -> Resolved:
        """Return the settings, with the plan's values."""
        return self.planned.resolved

    def identity(self) -> RunIdentity:
        """Return the run's identity. For a new run the whole base is read and hashed."""
        if self.known is not None:
            return self.known
        fingerprint = fingerprint_of(self.resolved.config, self.template, self.planned.prepared)
        return RunIdentity(self.run_id, fingerprint, environment(self.resolved.config))

    def write(self, identity: RunIdentity) -> RunIdentity:
        """Write the files that describe the run, and return its identity with their hashes.

        run.yaml comes last, since a folder with run.yaml holds a run. A resumed run keeps its run.yaml.
        """
        self.lock.hold()  # loading takes minutes
        config = self.resolved.config
        sealing = write_relied_on(self.run, identity, config, self.template, self.planned.prepared)
        self.run.write_json(self.run.plan, self.planned.plan.to_dict())
        self._write_findings(self.findings)
        if self.known is None:
            sources = {key: source.value for key, source in self.resolved.sources.items()}
            self.run.write_config(config, sources)
        return sealing

    def require_folder(self) -> None:
        """Raise RunDirError if the folder is gone or another process holds it. Each step ends with this."""
        if not self.lock.is_held:
            raise RunDirError(
                "the run's folder was removed or taken while it trained",
                where=str(self.run.path),
                fix="leave the folder alone, and run the same command again",
            )

    def require_whole(self, *more: Path) -> None:
        """Raise RunDirError if a file that other commands need is missing. Each checkpoint ends with this."""
        self.require_folder()
        run = self.run
        needed = (run.settings, run.identity, run.template, run.samples, run.base, *more)
        gone = [str(path.relative_to(run.path)) for path in needed if not path.is_file()]
        if gone:
            raise RunDirError(
                f"{', '.join(gone)} of this run disappeared while it trained",
                where=str(run.path),
                fix="leave the folder alone, and run the same command again",
            )

    def findings_with(self, own: list[Finding]) -> list[Finding]:
        """Return all findings, with the run's `own` ones if there are any, and write them."""
        if own:
            self._write_findings([*self.findings, *own])
        return [*self.findings, *own]

    def _write_findings(self, findings: list[Finding]) -> None:
        self.run.write_json(self.run.findings, [finding.to_dict() for finding in findings])


def write_relied_on(
    run: RunDir, identity: RunIdentity, config: RunConfig, template: Template, prepared: Prepared
) -> RunIdentity:
    """Write the files that `chat` and `merge` read, and which rows are held out. Returns the identity that seals them.

    Settings and adapter are written elsewhere.
    """
    write_split(run.split, prepared.train, prepared.holdout)
    template.save(run.template)
    write_text(run.samples, "".join(_sample_line(record) for record in _samples(prepared)))
    base = {"base": config.base, "revision": config.revision, "fingerprint": identity.fingerprint.base}
    run.write_json(run.base, base)
    return run.seal_files(identity)


def _samples(prepared: Prepared) -> list[Record]:
    """Return the first held-out rows, and training rows where those alone are too few for a proof."""
    held_out, train = prepared.holdout, prepared.train
    if not len(held_out):
        return [train.record(index) for index in range(min(len(train), SAMPLE_ROWS))]
    records = [held_out.record(index) for index in range(min(len(held_out), SAMPLE_ROWS))]
    return records + [train.record(index) for index in range(min(len(train), FEW_ROWS - len(records)))]


def _sample_line(record: Record) -> str:
    sample: dict[str, Any] = {"messages": record.messages(), "source": record.source}
    if record.tools:
        sample["tools"] = [dict(tool) for tool in record.tools]
    if record.template_kwargs:
        sample["template_kwargs"] = dict(record.template_kwargs)
    if any(turn.loss is not None for turn in record.turns):
        sample["loss"] = [turn.loss for turn in record.turns]
    return json.dumps(sample, ensure_ascii=False) + "\n"


def known_identity(place: RunTarget, config: RunConfig, now: RunFingerprint) -> RunIdentity:
    """Return the identity of the run in `place` if its fingerprint equals `now`.

    `now` is the fingerprint by the settings `config`. Raises RunDirError naming what differs. Raises OtherRows for a
    finished run over other rows in a folder that the user did not name.
    """
    run, identity = place.run, RunIdentity.read(place.run.identity)
    if run.is_finished and not place.is_named and identity.fingerprint.differences(now):
        raise OtherRows
    refuse_other_content(run, config, identity.fingerprint, now)
    return identity


def refuse_at_end(run: RunDir, identity: RunIdentity) -> None:
    """Raise RunFinished if the run is at its end and its adapter is unchanged."""
    if run.is_finished and _is_whole(run, identity):
        if not identity.adapter:  # of an older release, and equal to the last checkpoint
            run.write_json(run.identity, identity.ended_in(result_hashes(run.adapter)).to_dict())
        refuse_finished(run)


def resume_from(run: RunDir, identity: RunIdentity, layout: Mapping[str, Any], events: EventLog) -> Checkpoint | None:
    """Return the checkpoint to resume from, None to start at the first step.

    Each damaged checkpoint is skipped and becomes an event. `layout` is today's layout, from `layout_of`. Raises
    RunDirError, and renames nothing, if no checkpoint is this run's and one is another run's.
    """
    checkpoint, damaged = newest_whole(run.checkpoints, identity.run)
    if checkpoint is None and any(one.is_foreign for one in damaged):
        raise RunDirError(
            "the checkpoints belong to another run than fingerprint.json",
            where=str(run.path),
            fix="put the run's own fingerprint.json back, or pass --restart, which moves the folder aside",
        )
    clear_unfinished(run.checkpoints)
    if run.adapter.exists():
        events.record("adapter_damaged", 0, "the adapter is not the trained one; it is written again")
    for one in damaged:
        events.record("checkpoint_damaged", one.step, f"{one.folder.name} is skipped: {one.reason}")
    try:
        set_aside(damaged)
    except OSError as error:
        raise RunDirError(
            f"a damaged checkpoint cannot be renamed ({error.strerror})",
            where=str(run.checkpoints),
            fix="remove the folder",
        ) from error
    if checkpoint is None:
        events.record("resumed", 0, "there is no valid checkpoint yet; the run restarts at its first step")
    else:
        events.record("resumed", checkpoint.step, f"the run resumes from {checkpoint.folder.name}")
    _note_changes(run, identity, layout, checkpoint, events)
    return checkpoint


def describe_run(
    manifest: Manifest, hashed: Future[RunIdentity] | None, layout: dict[str, Any], events: EventLog
) -> tuple[RunIdentity, Checkpoint | None]:
    """Describe the run in its folder, and return its identity and first checkpoint.

    The checkpoint is None for the first step. Only process 0 calls this, and has `hashed` the base.
    """
    assert hashed is not None, "process 0 hashes the base"
    identity = hashed.result()
    _refuse_other_base(manifest.resolved.config, identity)
    if manifest.known is None:  # a new run records its first layout
        identity = replace(identity, environment={**identity.environment, **layout})
    identity = manifest.write(identity)
    if manifest.known is None:
        return identity, None
    return identity, resume_from(manifest.run, identity, layout, events)


def _refuse_other_base(config: RunConfig, identity: RunIdentity) -> None:
    """Raise AdapterError if the initial adapter's run had another base."""
    run = InitialAdapter.open(config.init_adapter).run if config.init_adapter else None
    if run is not None and run.base_fingerprint() not in (None, identity.fingerprint.base):
        what = "the initial adapter was trained on another base than this run's"
        raise AdapterError(what, where=str(run.path), fix=f"set base: {run.config().base}")


def layout_of(config: RunConfig, memory: TunedMemory, dry_run: DryRun | None, processes: int = 1) -> dict[str, Any]:
    """Return the layout that the run's last bits depend on, as JSON values.

    On a GPU the dry run's policy counts, not the setting, since a resumed run keeps that policy. `processes` is named
    if there are several.
    """
    tokens = memory.micro_tokens
    layout = {key: getattr(config, key) for key in LAYOUT if key != "max_length"}
    if dry_run is not None:
        del layout["memory_policy"]
        layout["policy"] = str(replace(dry_run.policy, micro_tokens=None))
    several = {PROCESSES: processes} if processes > 1 else {}
    return {**layout, "micro_tokens": tokens, HELD_OUT_TOKENS: min(tokens, config.max_length), **several}


def _note_changes(
    run: RunDir, identity: RunIdentity, layout: Mapping[str, Any], checkpoint: Checkpoint | None, events: EventLog
) -> None:
    """Record an event if machine or layout differ from those at the run's start."""
    config = run.config()
    settings = config.model_dump(mode="json")
    began = {key: settings.get(key, value) for key, value in layout.items()} | dict(identity.environment)
    now = {**layout, **environment(config)}
    if checkpoint is not None:  # a resumed run never uses larger micro-batches than before
        for key in ("micro_tokens", HELD_OUT_TOKENS):
            now[key] = min(now[key], began["micro_tokens"])
    if PROCESSES in began or PROCESSES in now:
        began, now = {PROCESSES: 1, **began}, {PROCESSES: 1, **now}
    changed = differing_settings(began, now)
    step = checkpoint.step if checkpoint else 0
    if changed:
        words = ", ".join(f"{what} was {before} and is {after}" for what, before, after in changed)
        message = f"the machine or the layout has changed, so the run's last bits may differ: {words}"
        events.record("environment_changed", step, message)


def _is_whole(run: RunDir, identity: RunIdentity) -> bool:
    """Return False if the adapter of a finished run is not the saved one.

    A run of an older release, without hashes, is compared with its last checkpoint.
    """
    if identity.adapter:
        return changed_file(run.adapter, identity.adapter) is None
    checkpoint, _ = newest_whole(run.checkpoints, identity.run)
    if checkpoint is None or not checkpoint.is_last:
        return False
    saved = checkpoint.folder / ADAPTER
    names = [path.name for path in saved.iterdir()]
    same, _, _ = filecmp.cmpfiles(saved, run.adapter, names, shallow=False)
    return sorted(same) == sorted(names)


def save_result(run: RunDir, identity: RunIdentity, loop: TrainingLoop) -> list[Finding]:
    """Write the hashes of the trained weights, then the weights with the files that let them serve alone.

    Returns the findings about the prompt of that folder. Raises RunDirError, with the command to resume, if the disk
    refuses.
    """
    findings: list[Finding] = []

    def keep_hashes(staged: Path) -> None:
        findings.extend(write_adapter_companions(run, staged))
        # hashes first: after a kill in between, the unchecked weights are refused
        run.write_json(run.identity, identity.ended_in(result_hashes(staged)).to_dict())

    try:
        folder = run.weights_of(loop.method.name)
        loop.method.save(loop.model, folder, loop.config, written=keep_hashes)
        return findings
    except RunDirError as error:
        fix = f"free some space and resume with: {command_to_resume(run)}"
        raise RunDirError(f"the trained adapter: {error.what}", where=error.where, fix=fix) from error


def help_to_save(loop: TrainingLoop) -> None:
    """Give process 0 this one's shards while it saves the result."""
    if is_sharded(loop.model):
        WeightsSnapshot.gathered(loop.model)


def refuse_stopped(run: RunDir, loop: TrainingLoop) -> None:
    """Raise TrainingStopped, with the command to resume, if a signal ended the run early."""
    stop, step, steps = loop.stop, loop.state.global_step, loop.arguments.max_steps
    if stop is None or (step >= steps and not loop.owes_evaluation):
        return
    newest = loop.checkpoints.newest()
    kept = f"the newest checkpoint is {newest.name}" if newest else "no checkpoint could be written"
    raise TrainingStopped(
        stop,
        f"{signal.Signals(stop).name} after step {step} of {steps}; {kept}",
        where=str(run.path),
        fix=f"resume with: {command_to_resume(run)}",
    )


def command_to_resume(run: RunDir) -> str:
    """Return the command that resumes the run, independent of the original command."""
    return shlex.join(["lorafit", "train", str(run.settings), "--out", str(run.path)])
