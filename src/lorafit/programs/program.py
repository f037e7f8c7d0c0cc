"""Program: an HTTP server that runs as a child process, started, waited for and stopped with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorafit.errors import ProgramError

POLL_S = 0.25
LOG_TAIL_BYTES = 16 << 10
ERROR_MARKS = ("Error: ", "error: ", "ERROR ")


@dataclass(eq=False)
class Program:
    """Hold a server program and its process.

    Attributes:
        name: the program's name for people.
        command: the command line.
        folder: the folder in which it runs.
        port: the port on 127.0.0.1 where it listens.
        log: the file that gets its output.
        environment: all variables of the process.
    """

    name: str
    command: Sequence[str]
    folder: Path
    port: int
    log: Path
    environment: Mapping[str, str] = field(repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    @property
    def url(self) -> str:
        """Return the address of the server."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        """Return True while the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def process_id(self) -> int | None:
        """Return the id of the process, or None before the start."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process, which appends to the log. Raises ProgramError if it cannot be executed."""
        try:
            with self.log.open("ab") as log:
                # a group of its own, so that the program's own children end with it
                self._process = subprocess.Popen(
                    list(self.command),
                    cwd=self.folder,
                    env=dict(self.environment),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise ProgramError(
                f"{self.name} cannot be started ({error.strerror})", where=str(self.command[0])
            ) from error

    def wait_until_healthy(self, timeout_s: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Return once the server answers /health. Raises ProgramError if it ends first or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self.is_healthy():
            if not self.is_running or stopped():
                raise ProgramError(f"{self.name} ended at its start ({self.last_words()})", where=str(self.log))
            if time.monotonic() > deadline:
                what = f"{self.name} does not answer after {timeout_s:.0f} s"
                raise ProgramError(what, where=str(self.log), fix="read the log")
            time.sleep(POLL_S)

    def is_healthy(self) -> bool:
        """Return True if the server answers /health with 200."""
        if not self.is_running:
            return False
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, ValueError):
            return False

    def stop(self, timeout_s: float = 15.0) -> None:
        """End the process and its children: SIGTERM first, and SIGKILL after `timeout_s`."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        _signal(process.pid, signal.SIGKILL)
        process.wait()

    def last_words(self) -> str:
        """Return the last line of the log that names an error, or its last line."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
                lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        except OSError:
            return "no log"
        errors = [line for line in lines if any(mark in line for mark in ERROR_MARKS)]
        return (errors or lines or ["it wrote nothing"])[-1][-300:]


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def post_json(url: str, body: Mapping[str, Any], timeout_s: float = 300.0, *, expects_json: bool = True) -> Any:
    """Return the JSON answer to `body`, or None unless it `expects_json`.

    Raises ProgramError with the server's message for any status of an error.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer) if expects_json else None
    except urllib.error.HTTPError as error:
        said = error.read(2000).decode("utf-8", "replace")
        raise ProgramError(f"the server answers {error.code} ({said[:300]})", where=url) from error
    except (OSError, ValueError) as error:
        raise ProgramError(f"the server does not answer ({error})", where=url) from error


def _signal(process_id: int, number: int) -> None:
    try:
        os.killpg(process_id, number)
    except ProcessLookupError:
        return
