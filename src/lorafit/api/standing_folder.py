"""StandingFolder: what somebody removes from a run's folder while the run trains is said, and written again."""

from __future__ import annotations

from typing import Any

from lorafit.api.ready_run import ReadyRun
from lorafit.errors import RunDirError
from lorafit.runs import RunIdentity, write_text
from lorafit.training import LorafitTrainer, MetricsLog
from lorafit.training.trainer_library import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StandingFolder(TrainerCallback):
    """The folder of a run of this `identity`: whether it stands is asked at each step, and before each checkpoint and
    at the end for each file in it.

    A disk that refuses ends no training; another run in this place does, before anything of it is touched.
    """

    def __init__(self, ready: ReadyRun, identity: RunIdentity, trainer: LorafitTrainer) -> None:
        self.ready, self.run, self.identity, self.trainer = ready, ready.run, identity, trainer
        # how the layers run is known to nothing but this file
        self.engine = self.run.engine.read_text(encoding="utf-8") if self.run.engine.exists() else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.ready.lock.is_held and not control.should_save:
            return
        try:
            self.mend()
        except RunDirError as error:
            if not isinstance(error.__cause__, OSError):
                raise
        except OSError:
            return  # the checkpoint meets the same disk, and says so

    def mend(self) -> None:
        """Write again what has gone. Raises RunDirError when another run has this place by now, or the disk refuses,
        OSError when the folder cannot be made."""
        self.run.path.mkdir(parents=True, exist_ok=True)
        self._require_own()
        gone = self.ready.describe_again(self.identity) + self._logs_that_are_gone()
        checkpoints = self.trainer.checkpoints
        lost = checkpoints.has_written and checkpoints.newest() is None
        if not gone and not lost:
            return
        parts = [f"{', '.join(gone)} had gone from {self.run.path}, and is written again"] if gone else []
        parts += [f"all checkpoints had gone from {self.run.path}: the next one is the first"] if lost else []
        checkpoints.has_written = False
        self.trainer.events.record("described_again", self.trainer.state.global_step, "; ".join(parts))

    def require_whole(self) -> None:
        """RunDirError unless the adapter and what describes it are there: nobody says "done" without."""
        run = self.run
        adapter = [run.adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")]
        parts = (run.settings, run.identity, run.template, run.samples, run.base, *adapter)
        gone = [str(path.relative_to(run.path)) for path in parts if not path.is_file()]
        if gone:
            raise RunDirError(
                f"{', '.join(gone)} of the trained run went while it was being written",
                where=str(run.path),
                fix="leave the folder alone, and give the same command again",
            )

    def _require_own(self) -> None:
        try:
            self.ready.lock.hold()
            self._refuse_another()
        except RunDirError as error:
            if not isinstance(error.__cause__, OSError):
                self.trainer.remove_callback(MetricsLog)  # its file is the other's now
            raise

    def _refuse_another(self) -> None:
        if not self.run.identity.is_file():
            return
        try:
            other = RunIdentity.read(self.run.identity).run
        except RunDirError:
            return  # damaged, and the end of this run writes it anew
        if other != self.identity.run:
            raise RunDirError(
                "the folder was removed while this run trained, and holds another run by now",
                where=str(self.run.path),
                fix="train in a folder of its own, with another --out",
            )

    def _logs_that_are_gone(self) -> list[str]:
        """What the run's own logs lack, by name; the events are written again with the next one."""
        events, names = self.trainer.events, []
        if self.engine is not None and not self.run.engine.exists():
            write_text(self.run.engine, self.engine)
            names.append(self.run.engine.name)
        if events.lines and not self.run.events.exists():
            names.append(self.run.events.name)
        return names
