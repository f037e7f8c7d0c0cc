"""TemplateRenderer: chat templates rendered in a bounded child (worker.py), in batches."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any

from lorafit.data.bounded_child import child_environment, command_of
from lorafit.errors import TemplateError

WORKER = Path(__file__).with_name("worker.py")
MAX_BYTES = 512 << 20
MAX_CPU_S = 1.0
FROZEN_NOW = datetime(2024, 7, 26)
"""What `strftime_now` tells a template, Llama 3's own default date: a prompt must not change overnight."""

CHUNK_ROWS = 256
CHUNK_CHARACTERS = 4 << 20
WAIT_S = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """A conversation to render: `ask` for a generation prompt at its end, `cuts` to compare with it.

    A cut (count, ask) stands for the first `count` messages rendered alone. `kwargs` are variables of the row's own.
    With `as_served` the text begins with the last prompt among the cuts, where the template can be made to say so.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    ask: bool = False
    cuts: Sequence[tuple[int, bool]] = ()
    where: str = "the chat template"
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    as_served: bool = False

    def frame(self) -> list[Any]:
        """Return the request as the worker reads it."""
        # a template sees `tools` as None when there are none, as transformers has it
        tools = list(self.tools) or None
        return [list(self.messages), tools, self.ask, list(self.cuts), dict(self.kwargs), self.as_served]

    @property
    def characters(self) -> int:
        """Return the approximate number of characters in the request."""
        plain = sum(len(message.get("content") or "") for message in self.messages)
        # tools and calls are trees: as text they are about as long as the template writes them
        calls = (message["tool_calls"] for message in self.messages if "tool_calls" in message)
        return plain + sum(len(str(tree)) for tree in (*self.tools, *calls))


@dataclass(frozen=True, slots=True)
class Rendering:
    """Rendered text; `spans` of its `{% generation %}` blocks; per cut, (length, common prefix with the text)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    cuts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """The template's own message about a row that it would not render."""

    reason: str


@dataclass
class _Child:
    """A running worker and its answer about the template. It belongs to the process that started it."""

    process: subprocess.Popen[bytes]
    marks_generation: bool = False
    reads: frozenset[str] = frozenset()
    owner: int = field(default_factory=os.getpid)


class TemplateRenderer:
    """Render one chat template. Threads take turns; a forked or unpickled copy starts its own child."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        self.source = source
        self.variables = dict(variables)
        self._child: _Child | None = None
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "variables": self.variables}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        TemplateRenderer.__init__(self, state["source"], state["variables"])

    @property
    def marks_generation(self) -> bool:
        """True if the template has `{% generation %}` blocks."""
        with self._lock:
            return self._running().marks_generation

    @property
    def reads(self) -> frozenset[str]:
        """The variables that the template reads."""
        with self._lock:
            return self._running().reads

    def render(self, request: Request) -> Rendering | Refusal:
        """Render one conversation. Raises TemplateError if the template exceeds its time or memory."""
        answers: list[Rendering | Refusal] = []
        self.render_many([request], answers.extend)
        return answers[0]

    def render_many(self, requests: Iterable[Request], use: Callable[[list[Rendering | Refusal]], None]) -> None:
        """Render every conversation, in order. `use` takes one chunk of answers while the child renders the next.

        Raises TemplateError when the template exceeds its time or memory.
        """
        with self._lock:
            try:
                chunks = _chunks(requests)
                pending = self._sent(chunks)
                while pending:
                    answers = self._received(pending)
                    pending = self._sent(chunks)
                    use(answers)
            except BaseException:
                self._discard()  # an answer may still be under way: the next call must not read it
                raise

    def _sent(self, chunks: Iterator[list[Request]]) -> list[Request]:
        chunk = next(chunks, [])
        if chunk:
            _write(self._running(), [request.frame() for request in chunk])
        return chunk

    def _received(self, chunk: Sequence[Request]) -> list[Rendering | Refusal]:
        child = self._running()
        answers = _read(child)
        if answers is None and len(chunk) > 1:
            # the child died on one of them: each alone shows which, or that only all together were too much
            self._discard()
            return [self._received(self._sent(iter([[request]])))[0] for request in chunk]
        if answers is None:
            raise self._gone(child, chunk[0].where)
        assert len(answers) == len(chunk), "the worker answers every row"
        return [self._answer(answer, request) for answer, request in zip(answers, chunk)]

    def _answer(self, answer: list[Any], request: Request) -> Rendering | Refusal:
        if len(answer) == 2 and answer[0] == "unbounded":
            raise _unbounded(request.where, answer[1])
        if len(answer) == 2:
            return Refusal(answer[1])
        text, spans, cuts = answer
        return Rendering(text, tuple(map(tuple, spans)), tuple(map(tuple, cuts)))

    def _running(self) -> _Child:
        if self._child is None or self._child.owner != os.getpid():
            return self._started()
        return self._child

    def _started(self) -> _Child:
        child = self._child = _Child(_spawn())
        weakref.finalize(self, _stop, child.process, child.owner)
        _write(child, [self.source, self.variables, FROZEN_NOW.isoformat(), MAX_BYTES, MAX_CPU_S])
        answer = _read(child)
        if answer is None:
            raise self._gone(child, "the chat template")
        if answer[0] == "unbounded":
            raise _unbounded("the chat template", answer[1])
        if answer[0] == "refused":
            raise TemplateError(
                f"the chat template is not valid Jinja ({answer[1]})", fix="mend chat_template in the base's tokenizer"
            )
        child.marks_generation, child.reads = bool(answer[1]), frozenset(answer[2])
        return child

    def _discard(self) -> None:
        if self._child is not None:
            _stop(self._child.process, self._child.owner)
        self._child = None

    def _gone(self, child: _Child, where: str) -> TemplateError:
        child.process.kill()
        code = child.process.wait()
        if code == -signal.SIGPROF:
            return _unbounded(where, f"more than {MAX_CPU_S:.0f} s of computing for one text")
        return _unbounded(where, f"its process died with code {code}")


def _unbounded(where: str, reason: str) -> TemplateError:
    words = {"MemoryError": "more than 512 MB of memory", "RecursionError": "endless recursion"}
    return TemplateError(
        f"the chat template does not end within bounds ({words.get(reason, reason)})",
        where=where,
        fix="do not trust this base's chat template, or replace it",
    )


def _spawn() -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command_of(WORKER),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(),
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )


def _stop(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked copy must not end the child of its parent
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # what was not sent yet has no reader any more
            _pipe(stream).close()


def _chunks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    source = iter(requests)
    while chunk := list(islice(source, CHUNK_ROWS)):
        yield from _by_size(chunk)


def _by_size(chunk: list[Request]) -> Iterator[list[Request]]:
    part: list[Request] = []
    characters = 0
    for request in chunk:
        if part and characters + request.characters > CHUNK_CHARACTERS:
            yield part
            part, characters = [], 0
        part.append(request)
        characters += request.characters
    yield part


def _write(child: _Child, message: Any) -> None:
    body = json.dumps(message, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")
    stream = _pipe(child.process.stdin)
    with contextlib.suppress(BrokenPipeError):  # the child is gone: the read that follows says why
        stream.write(len(body).to_bytes(8, "little") + body)
        stream.flush()


def _plain(value: Any) -> Any:
    # as transformers: numbers of numpy and arrow become plain ones, anything else a placeholder
    item = getattr(value, "item", None)
    return item() if callable(item) else f"<{type(value).__name__}>"


def _read(child: _Child) -> Any:
    """Return the child's next frame, or None if it died or was silent for a minute."""
    stream = _pipe(child.process.stdout)
    head = _exactly(stream, 8)
    body = _exactly(stream, int.from_bytes(head, "little")) if head else None
    return None if body is None else json.loads(body.decode("utf-8", "surrogatepass"))


def _exactly(stream: IO[bytes], count: int) -> bytes | None:
    parts: list[bytes] = []
    while count:
        ready, _, _ = select.select([stream], [], [], WAIT_S)
        part = os.read(stream.fileno(), min(count, 1 << 20)) if ready else b""
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None, "the worker is started with pipes"
    return stream
