"""Errors: the tree of everything a user can get wrong. The module imports nothing.

    LorafitError                exit code 1
    ├── UsageError              exit code 2: a flag, key or value that does not exist or does not fit
    ├── DataError               a data file that cannot be read, or rows that cannot be trained on
    ├── TemplateError           a chat template that fails, or a prompt that differs from the trained one
    ├── BackboneError           a base model that is missing, incomplete or of a kind lorafit cannot freeze
    ├── AdapterError            targets that do not exist, adapter files that must not be trusted
    ├── PlanError               a run that cannot fit or finish on its hardware
    ├── RunDirError             a run directory that is missing, in use, full or not writable
    │   ├── CheckpointError     a checkpoint that is damaged, or that belongs to another run
    │   └── RunFinished         exit code 0: the run is complete
    ├── TrainingError           a run that had to stop
    │   ├── TrainingStopped     exit code 130 or 143: a signal stopped the run, which can resume
    │   └── ProcessLost         another process of a run on several GPUs ended or hangs
    ├── ProgramError            another program, such as vLLM, that does not start or answer
    └── VerificationError       an artefact that is not the model that was trained

Every error is one sentence: what happened, where, and the fix. The command line prints it without a
traceback. Broken invariants of lorafit itself are `assert`s, which show a traceback.
"""

from __future__ import annotations


class LorafitError(Exception):
    """Base of every error that a user can cause and fix.

    Attributes:
        what: What happened.
        where: A file:line, a settings key or a path.
        fix: What the user can do.
        sentence: The three joined, which is the message.
    """

    exit_code = 1
    label = "error"

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.sentence)

    @property
    def sentence(self) -> str:
        """The complete message, as the command line prints it."""
        where = f"{self.where}: " if self.where else ""
        fix = f"; {self.fix}" if self.fix else ""
        return f"{where}{self.what}{fix}"


class UsageError(LorafitError):
    """A flag, key or value that does not exist or does not fit."""

    exit_code = 2


class DataError(LorafitError):
    """A data file that cannot be read, or rows that cannot be trained on."""


class TemplateError(LorafitError):
    """A chat template that fails, or a prompt that differs from the trained one."""


class BackboneError(LorafitError):
    """A base model that is missing, incomplete, or of a kind that lorafit cannot freeze."""


class AdapterError(LorafitError):
    """Targets that the model lacks, or adapter files that must not be trusted."""


class PlanError(LorafitError):
    """A run that cannot fit or finish on its hardware."""


class RunDirError(LorafitError):
    """A run directory that is missing, in use, full or not writable."""


class CheckpointError(RunDirError):
    """A checkpoint that is damaged, or that belongs to another run."""


class RunFinished(RunDirError):
    """The run in this directory is complete. It ends the command without being a failure."""

    exit_code = 0
    label = "finished"


class ProgramError(LorafitError):
    """Another program, such as vLLM, that does not start or answer."""


class TrainingError(LorafitError):
    """A run that had to stop."""


class TrainingStopped(TrainingError):
    """A signal stopped the run after a complete step. The same command resumes it."""

    label = "stopped"

    def __init__(self, signal_number: int, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what, where=where, fix=fix)
        self.exit_code = 128 + signal_number


class ProcessLost(TrainingError):
    """Another process of this run ended or hangs. Process 0 reports it; the others end in silence."""


class StoppedAtOnce(KeyboardInterrupt):
    """A second stopping signal, `number`, arrived during training.

    It never reaches a user: EarlySignals turns it into TrainingStopped.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class VerificationError(LorafitError):
    """An artefact on disk that does not behave as the model that was trained."""
