"""redirect_library_logs: what other libraries say goes to a log file, so that the console holds lorafit's lines only.

bitsandbytes logs at import through a logger without handlers (which Python prints to stderr), transformers
owns a stderr handler and tqdm bars, torch owns one handler per logger, and anybody may `warnings.warn`.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from lorafit.errors import RunDirError

LIBRARIES = ("transformers", "bitsandbytes", "peft", "accelerate", "datasets", "huggingface_hub", "torch", "kernels")
MAX_PENDING_LINES = 1000


class LibraryLog(logging.Handler):
    """Writes records to a file; keeps them (the first MAX_PENDING_LINES) until a file is known."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        # torch's tracing logger hands on whatever it is given: hundreds of empty lines a compiled layer
        self.setLevel(logging.INFO)
        self.pending: list[str] = []
        self.path: Path | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write or keep one record. A full disk must not stop a run for a log line: the line is dropped."""
        if len(self.pending) < MAX_PENDING_LINES:
            self.pending.append(self.format(record))
        if self.path is not None:
            self._write_pending(self.path)

    def write_to(self, path: Path | None) -> None:
        """Send this and all later lines to `path` (None keeps them). Raises RunDirError when it cannot be opened."""
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
            except OSError as error:
                raise RunDirError(f"the log cannot be written ({error.strerror})", where=str(path)) from error
            self._write_pending(path)
        self.path = path

    def _write_pending(self, path: Path) -> None:
        try:
            with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
                stream.writelines(line + "\n" for line in self.pending)
        except OSError:
            return
        self.pending.clear()


LIBRARY_LOG = LibraryLog()


class _Silence:
    """What all open blocks share: how many there are, and how to undo what the first one and later ones changed."""

    lock = threading.Lock()
    depth = 0
    undo = ExitStack()


@contextmanager
def redirect_library_logs(log_file: Path | None = None, *, optional: bool = False) -> Iterator[None]:
    """Send other libraries' logging and warnings to `log_file` and show no progress bars, until the block ends.

    Nested blocks are fine, in several threads too: one without a file writes to the last one named. With no file
    at all, lines are kept in memory and go to the first file named later. When the last block ends, everything
    is put back as it was, errors included. Raises RunDirError when the file cannot be written; with `optional` the
    block goes on without it.
    """
    before = LIBRARY_LOG.path
    with _Silence.lock:
        if log_file is not None:
            _open_log(log_file, optional)
        _Silence.depth += 1
        _silence(_Silence.undo)
    try:
        yield
    finally:
        with _Silence.lock:
            LIBRARY_LOG.path = before
            _Silence.depth -= 1
            if _Silence.depth == 0:
                _Silence.undo.close()


def _open_log(log_file: Path, optional: bool) -> None:
    try:
        LIBRARY_LOG.write_to(log_file)
    except RunDirError:
        if not optional:
            raise


def _silence(undo: ExitStack) -> None:
    """Redirect whatever still speaks; libraries imported inside an outer block may have joined since."""
    _hide_progress_bars(undo)
    for logger in _library_loggers():
        if logger.handlers != [LIBRARY_LOG] or logger.propagate:
            _change(undo, logger, "handlers", [LIBRARY_LOG])
            _change(undo, logger, "propagate", False)
    # a record that meets no handler is printed by logging.lastResort; the application's own handlers stay
    _change(undo, logging, "lastResort", LIBRARY_LOG)
    _change(undo, warnings, "showwarning", _log_warning)


def _change(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _library_loggers() -> list[logging.Logger]:
    """The libraries' own loggers, and any child of theirs that has handlers of its own (torch has many)."""
    children = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in LIBRARIES]
    loggers = map(logging.getLogger, {*LIBRARIES, *children})
    return [logger for logger in loggers if logger.name in LIBRARIES or logger.handlers]


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """In place of `warnings.showwarning`."""
    record = logging.LogRecord(
        "py.warnings", logging.WARNING, filename, lineno, "%s: %s (%s:%s)",
        (category.__name__, message, filename, lineno), None,
    )  # fmt: skip
    LIBRARY_LOG.handle(record)


def _hide_progress_bars(undo: ExitStack) -> None:
    if transformers_logging.is_progress_bar_enabled():
        undo.callback(transformers_logging.enable_progress_bar)
        transformers_logging.disable_progress_bar()
    datasets = sys.modules.get("datasets")
    if datasets is not None and datasets.is_progress_bar_enabled():
        undo.callback(datasets.enable_progress_bars)
        datasets.disable_progress_bars()
