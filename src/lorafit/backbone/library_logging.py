"""Library logging: messages of other libraries go to a log file, not to the console.

bitsandbytes logs at import through a logger without handlers (which Python prints to stderr), transformers
owns a stderr handler and tqdm bars, torch owns one handler per logger, and any library may call `warnings.warn`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lorafit.errors import RunDirError
from lorafit.runs import append_own

LIBRARIES = (
    *("transformers", "bitsandbytes", "peft", "accelerate", "datasets", "huggingface_hub", "torch", "kernels"),
    "py.warnings",
)
MAX_PENDING_LINES = 1000


class LibraryLog(logging.Handler):
    """Write records to the file at `path`.

    Until a path is set, the first MAX_PENDING_LINES records are kept in memory.
    """

    def __init__(self) -> None:
        # torch's tracing logger emits hundreds of empty lines for each compiled layer
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.pending: list[str] = []
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write or keep one record."""
        if len(self.pending) < MAX_PENDING_LINES:
            self.pending.append(self.format(record) + "\n")
        with suppress(OSError):  # a full disk must not stop a run for a log line
            self.write()

    def write(self) -> None:
        """Write the pending lines if a path is set."""
        if self.path is not None:
            append_own(self.path, "".join(self.pending))
            self.pending.clear()


LIBRARY_LOG = LibraryLog()


@contextmanager
def redirect_library_logs(log_file: Path | None = None, *, optional: bool = False) -> Iterator[None]:
    """Send other libraries' logs and warnings to `log_file`, and show no progress bars, inside the block.

    A nested block without a file writes to the outer one's. Without any file, lines are kept in memory for the first
    file named later. Raises RunDirError when the file cannot be written; with `optional` the block runs without a log.
    """
    with ExitStack() as undo:
        if log_file is not None:
            _change(undo, LIBRARY_LOG, "path", log_file)
            try:
                log_file.parent.mkdir(parents=True, exist_ok=True)
                LIBRARY_LOG.write()
            except OSError as error:
                if not optional:
                    what = f"the log cannot be written ({error.strerror})"
                    raise RunDirError(what, where=str(log_file)) from error
        _hide_progress_bars(undo)
        for logger in _library_loggers():
            _change(undo, logger, "handlers", [LIBRARY_LOG])
            _change(undo, logger, "propagate", False)
        # logging.lastResort prints records without a handler; the application's own handlers stay
        _change(undo, logging, "lastResort", LIBRARY_LOG)
        _change(undo, warnings, "showwarning", _log_warning)
        yield


def _change(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _library_loggers() -> list[logging.Logger]:
    """Return the libraries' loggers, and their child loggers that have handlers (torch has many)."""
    children = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in LIBRARIES]
    loggers = map(logging.getLogger, {*LIBRARIES, *children})
    return [logger for logger in loggers if logger.name in LIBRARIES or logger.handlers]


def _log_warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    """Log a warning in place of `warnings.showwarning`."""
    text = "%s: %s (%s:%s)"
    logging.getLogger("py.warnings").warning(text, category.__name__, message, filename, lineno)


def _hide_progress_bars(undo: ExitStack) -> None:
    if transformers_logging.is_progress_bar_enabled():
        undo.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
    datasets = sys.modules.get("datasets")
    if datasets is not None and datasets.is_progress_bar_enabled():
        undo.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
