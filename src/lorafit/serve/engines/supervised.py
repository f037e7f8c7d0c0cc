"""SupervisedEngine: a server program behind lorafit's door, started again when it ends."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorafit.errors import ProgramError, UsageError
from lorafit.programs import Program, post_json
from lorafit.serve.engines.exported_adapter import require_adapter

LOG = logging.getLogger("lorafit.serve")
State = Literal["starting", "ready", "draining", "failed", "stopped"]
START_S = 1800.0
"""Most seconds of a start: a large model is read from a slow disk."""
FAILED_STARTS = 3
"""Starts in a row that do not come to an answer, after which the engine has failed."""
POLL_S = 0.5


@dataclass(frozen=True)
class ServedFolder:
    """Hold what a program serves.

    Attributes:
        base_name: the name that asks for the model, or for the base of its adapters.
        adapters: adapter's name -> folder.
        roots: folders from which adapters may be loaded at run time; none means that the program takes none.
        most_rank: largest rank of an adapter that the program takes.
        template: the chat template that every adapter must have; None checks nothing.
        numbered: names of the adapters that requests name by their number, in that order.
    """

    base_name: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    roots: tuple[Path, ...] = ()
    most_rank: int = 0
    template: Path | None = None
    numbered: tuple[str, ...] = ()

    def fields_for(self, name: str) -> dict[str, Any]:
        """Return the fields with which the program answers as `name`; they replace a client's own."""
        if not self.numbered:
            return {}
        # each is told, as llama.cpp's defaults are for all requests
        scales = [{"id": place, "scale": float(name == each)} for place, each in enumerate(self.numbered)]
        # kept prompts are found by their text alone, and one of another adapter would answer with its keys and values
        return {"lora": scales, "cache_prompt": False}


class SupervisedEngine:
    """Run a program, watch it on a thread, and start it again with the adapters that it had.

    Attributes:
        served: what it serves.
        state: starting, ready, draining, failed or stopped.
        restarts: number of starts after the first.
    """

    def __init__(
        self, make: Callable[[], Program], served: ServedFolder, on_crash: Callable[[BaseException], None]
    ) -> None:
        self.served, self.state, self.restarts = served, "starting", 0
        self._make, self._on_crash = make, on_crash
        self._program = make()
        self._adapters = dict(served.adapters)
        self._lock = threading.RLock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lorafit-supervisor", daemon=True)

    @property
    def url(self) -> str:
        """Return the program's address."""
        return self._program.url

    @property
    def process_id(self) -> int | None:
        """Return the id of the program's process."""
        return self._program.process_id

    def start(self) -> None:
        """Start the program and wait for its first answer. Raises ProgramError."""
        try:
            self._begin()
        except BaseException:
            self._program.stop()
            self.state = "failed"
            raise
        self.state = "ready"
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """End the program, which has `timeout_s` to finish its answers. Returns True if it ended in time."""
        self.state = "stopped"
        self._ends.set()
        began = time.monotonic()
        self._program.stop(max(timeout_s, 1.0))
        if self._thread.is_alive():
            self._thread.join(timeout=10)
            # the thread may have been starting it again
            self._program.stop()
            self.state = "stopped"
        return time.monotonic() - began < max(timeout_s, 1.0)

    def names(self) -> dict[str, Path]:
        """Return adapter's name -> folder."""
        with self._lock:
            return dict(self._adapters)

    def add_adapter(self, name: str, path: Path, *, replace: bool = False) -> None:
        """Check the exported adapter in `path`, and load it as `name`. Raises UsageError or ProgramError."""
        folder = self._allowed(path)
        with self._lock:
            if name == self.served.base_name:
                raise UsageError(f"{name} is the name of the base", where="lora_name", fix="choose another name")
            if name in self._adapters and not replace:
                fix = "unload it first, or send load_inplace"
                raise UsageError(f"the adapter {name} is already loaded", where="lora_name", fix=fix)
            if name in self._adapters:
                self._tell("unload", {"lora_name": name})
                del self._adapters[name]
            self._tell("load", {"lora_name": name, "lora_path": str(folder)})
            self._adapters[name] = folder

    def remove_adapter(self, name: str) -> None:
        """Unload the adapter called `name`. Raises UsageError for an unknown name, and ProgramError."""
        with self._lock:
            if name not in self._adapters:
                raise UsageError(f"no adapter of this name is loaded ({name[:128]})", where="lora_name")
            self._tell("unload", {"lora_name": name})
            del self._adapters[name]

    def _tell(self, verb: str, body: Mapping[str, str]) -> None:
        # the answer is a sentence
        post_json(f"{self.url}/v1/{verb}_lora_adapter", body, timeout_s=120, expects_json=False)

    def _allowed(self, path: Path) -> Path:
        if not self.served.roots:
            raise UsageError(f"{self._program.name} serves one model here, and loads no adapters", where="lora_path")
        return require_adapter(path, self.served.roots, self.served.most_rank, self.served.template)

    def _begin(self) -> None:
        self._program.start()
        self._program.wait_until_healthy(START_S, self._ends.is_set)
        with self._lock:
            known = self.served.adapters
            for name in set(known) - set(self._adapters):
                self._tell("unload", {"lora_name": name})
            for name, folder in self._adapters.items():
                if known.get(name) != folder:
                    if name in known:
                        self._tell("unload", {"lora_name": name})
                    self._tell("load", {"lora_name": name, "lora_path": str(folder)})

    def _watch(self) -> None:
        failed = 0
        while not self._ends.wait(POLL_S):
            if self._program.is_running or self._ends.is_set():
                continue
            error = ProgramError(f"{self._program.name} ended ({self._program.last_words()})")
            LOG.error("%s; it is started again", error.what)
            self.state = "starting"
            self._on_crash(error)
            self._program.stop()
            self._program = self._make()
            try:
                self._begin()
            except ProgramError as problem:
                failed += 1
                LOG.error("%s", problem.sentence)
                if failed >= FAILED_STARTS:
                    self.state = "failed"
                    return
                continue
            failed, self.restarts = 0, self.restarts + 1
            if not self._ends.is_set():
                self.state = "ready"
