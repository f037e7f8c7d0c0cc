"""RunContext: the files, processes, signals and callbacks of a training run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafit.runs.signals import StopSignals
from lorafit.training.distributed import Processes
from lorafit.training.logging.progress import StepProgress
from lorafit.training.logging.run_logs import EventLog
from lorafit.training.transformers_parts import TrainerCallback


@dataclass(frozen=True)
class RunContext:
    """Hold the surroundings of a training loop.

    Attributes:
        checkpoints: the folder of the checkpoints.
        run: the run's identifier, which its checkpoints carry.
        processes: the processes that train together; None for those of the group that the loop joins.
        events: the log of events.
        signals: the signals received so far.
        callbacks: transformers' callbacks and trackers.
        show: called with the progress after each step.
        before_write: called after each step, before anything is logged; it raises to end the run.
        before_save: called before each checkpoint; it raises to end the run.
    """

    checkpoints: Path
    run: str = ""
    processes: Processes | None = None
    events: EventLog = field(default_factory=EventLog)
    signals: StopSignals = field(default_factory=StopSignals)
    callbacks: Sequence[TrainerCallback] = ()
    show: Callable[[StepProgress], None] = lambda progress: None
    before_write: Callable[[], object] = lambda: None
    before_save: Callable[[], object] = lambda: None
