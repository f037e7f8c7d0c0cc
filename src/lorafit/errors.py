"""What a user can get wrong, as one tree. Imports nothing.

    LorafitError                exit code 1
    ├── UsageError              exit code 2: a flag, key or value that does not exist or does not fit
    ├── DataError               a data file that cannot be read, or rows that cannot be trained on
    ├── TemplateError           a chat template that fails, or a prompt that differs from the trained one
    ├── BackboneError           a base model that is missing, incomplete or of a kind lorafit cannot freeze
    ├── AdapterError            targets that do not exist, adapter files that must not be trusted
    ├── PlanError               a run that cannot fit or finish on the hardware at hand
    ├── RunDirError             a run directory that is missing, taken, full or not writable
    │   ├── CheckpointError     a checkpoint that is damaged, or that belongs to another run
    │   └── RunFinished         exit code 0: there is nothing left to train
    ├── TrainingError           a run that had to stop
    │   └── TrainingStopped     exit code 130 or 143: a signal asked for it; the run can go on
    └── VerificationError       an artefact that is not the model that was trained

Every error is one sentence: what happened, where, and what to do. The command line prints it without a
traceback; broken invariants of lorafit itself are `assert`s and do show one.
"""

from __future__ import annotations


class LorafitError(Exception):
    """Base of every error a user can cause and mend.

    `what` happened, `where` (a file:line, a key, a path) and the `fix`; the message joins them.
    """

    exit_code = 1
    label = "error"

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.sentence)

    @property
    def sentence(self) -> str:
        """The whole message as the command line prints it."""
        place = f"{self.where}: " if self.where else ""
        cure = f"; {self.fix}" if self.fix else ""
        return f"{place}{self.what}{cure}"


class UsageError(LorafitError):
    """A flag, key or value that does not exist or does not fit."""

    exit_code = 2


class DataError(LorafitError):
    """A data file that cannot be read, or rows that cannot be trained on."""


class TemplateError(LorafitError):
    """A chat template that fails, or a prompt that differs from the trained one."""


class BackboneError(LorafitError):
    """A base model that is missing, incomplete, or of a kind that cannot be frozen in 4 bits."""


class AdapterError(LorafitError):
    """Targets that do not exist in the model, or adapter files that must not be trusted."""


class PlanError(LorafitError):
    """A run that cannot fit or finish on the hardware at hand."""


class RunDirError(LorafitError):
    """A run directory that is missing, already taken, full or not writable."""


class CheckpointError(RunDirError):
    """A checkpoint that is damaged, or that belongs to another run."""


class RunFinished(RunDirError):
    """The run in this directory has trained to its end: nothing is wrong, and nothing is left to do."""

    exit_code = 0
    label = "finished"


class TrainingError(LorafitError):
    """A run that had to stop."""


class TrainingStopped(TrainingError):
    """A signal asked the run to stop; it did so after a whole step, and can go on from there."""

    label = "stopped"

    def __init__(self, signal_number: int, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signal_number


class StoppedAtOnce(KeyboardInterrupt):
    """A second stopping signal, `number`, fell while training ran. Never reaches a user: TrainingStopped does."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class VerificationError(LorafitError):
    """An artefact on disk that does not behave as the model that was trained."""
