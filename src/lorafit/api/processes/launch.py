"""launch: start the processes of a run through torch's elastic launcher (torch.distributed.launcher)."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lorafit.errors import TrainingError, UsageError
from lorafit.planning import Decision
from lorafit.runs.launched import FOLDER, left_error

STOP_S = "120"
"""Seconds that a stopped run has for its step and its checkpoint before the launcher kills it."""
LOGGERS = (
    "distributed.elastic.agent.server.api",
    "distributed.elastic.agent.server.local_elastic_agent",
    "distributed.elastic.multiprocessing.api",
    "distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler",
    "multiprocessing.spawn",
)
"""Loggers of torch whose warnings would stand beside the one sentence."""
FIRST_S = 5
"""Seconds after the first failure in which a killed process is a cause; later the launcher itself kills."""


def processes_to_start(chosen: Decision) -> int:
    """Return the number of processes for the decision `chosen` of `gpus`.

    A plan's number of GPUs becomes one if torch cannot use as many. Raises UsageError if the user's does.
    """
    if chosen.value == 1:
        return 1
    here = torch.cuda.device_count()
    if chosen.source == "plan":
        return chosen.value if chosen.value <= here else 1
    asked = chosen.value
    if not here:
        fix = "leave gpus out, or start CPU processes: torchrun --nproc-per-node 2 -m lorafit train …"
        raise UsageError("this machine has no GPU that torch can use", where="gpus", fix=fix)
    count = here if asked == "all" else int(asked)
    if count > here:
        raise UsageError(f"this machine has {here} GPUs, not {count}", where="gpus", fix=f"write gpus {here}, or all")
    return count


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run lorafit with `arguments` in `count` processes of this machine, and return the exit code.

    SIGINT and SIGTERM go to every process. The first process that ends with an error, or is killed, ends all. Raises
    the error that ended the run.
    """
    return supervise(count, sys.executable, "-m", "lorafit", *arguments)


def supervise(count: int, program: str | Callable[..., object], *arguments: str, start_method: str = "spawn") -> int:
    """Run `program`, an executable or a function, as `launch` does; a function's processes begin by `start_method`."""
    for name in LOGGERS:
        logging.getLogger(f"torch.{name}").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_S)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method=start_method,
    )
    with tempfile.TemporaryDirectory(prefix="lorafit-") as folder:
        os.environ[FOLDER] = folder
        try:
            elastic_launch(config, program)(*arguments)
            code = 0
        except SignalException as stopped:
            code = 128 + int(stopped.sigval)
        except ChildFailedError as failed:
            code = _exit_code(failed.failures)
        finally:
            del os.environ[FOLDER]
        if (error := left_error(Path(folder))) is not None:
            raise error
        return code


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """Return the exit code of a run whose processes failed, by rank.

    Raises TrainingError if one was killed.
    """
    first = min(failure.timestamp for failure in failures.values())
    codes = {rank: failure.exitcode for rank, failure in sorted(failures.items())}
    killed = {rank for rank, failure in failures.items() if failure.timestamp < first + FIRST_S}
    for rank in sorted(killed):
        number = -codes[rank]
        if number > 0 and number != signal.SIGTERM:
            raise TrainingError(
                f"process {rank} was killed ({signal.Signals(number).name}), and the run ended with it",
                fix="run the same command again, which resumes from the newest checkpoint",
            )
    return next((code for code in codes.values() if code > 0), 1)
