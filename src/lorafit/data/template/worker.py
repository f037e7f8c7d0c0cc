"""The child process that renders chat templates: jinja2 and the standard library only, bounded by the kernel.

A chat template is code from whoever published the base. The jinja2 sandbox keeps it off files and the
interpreter, but not off the clock and the memory: `range(99999)` nested twice runs for hours, and `s|replace`
can make terabytes in one call. So templates run here, under RLIMIT_AS and a CPU timer whose signal kills this
process; the parent (renderer.py) sees the pipe close. Run by path, so it imports nothing of lorafit.

Frames on stdin and stdout are an 8-byte length and JSON. The first frame is [source, variables, now, bytes, seconds]:
the template, its special tokens, the date it is told, and its bounds (seconds for one text). Each later frame
is a list of rows [messages, tools, ask, cuts, kwargs, as_served], where `ask` wants a generation prompt at the
end and a cut [count, ask] stands for the first `count` messages alone. A row is answered by [text, spans, cuts]
(see `Renderings.row`) or by [kind, reason].
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_CHARACTERS = 24 << 20
# what template code can raise on a row it does not like
ROW_ERRORS = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
UNBOUNDED_ERRORS = (RecursionError, MemoryError)


class Generation(jinja2.ext.Extension):
    """The `{% generation %}` tag: notes which characters the assistant wrote, as transformers does."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so
    marks: list[tuple[int, int]] | None = None
    blocks: list[str] | None = None

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Parse `{% generation %} body {% endgeneration %}` as a call block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    def _generated(self, caller: Callable[[], str]) -> str:
        text = caller()
        if self.marks is not None and self.blocks is not None:
            self.blocks[:] = ["".join(self.blocks)]
            start = len(self.blocks[0])
            self.marks.append((start, start + len(text)))
        return text


class Names:
    """`dict(...)` as transformers offers it: callable, with no way back to the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys`."""
        return dict.fromkeys(*args)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # not jinja2's own filter, which escapes HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(now: datetime) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return the Jinja environment of transformers' `apply_chat_template`, its clock at `now`.

    Source: utils/chat_template_utils.py.
    """
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = now.strftime
    made.globals["dict"] = Names()
    return made


class Renderings:
    """One compiled template and its special tokens. `seconds` of CPU bound each text."""

    def __init__(self, source: str, variables: dict[str, str], now: datetime, seconds: float) -> None:
        self.seconds = seconds
        self.environment = environment(now)
        syntax = self.environment.parse(source)
        self.reads = sorted(jinja2.meta.find_undeclared_variables(syntax))
        self.marks_generation = any(
            call.call.node.name == "_generated"
            for call in syntax.find_all(jinja2.nodes.CallBlock)
            if isinstance(call.call.node, jinja2.nodes.ExtensionAttribute)
        )
        self.template = self.environment.from_string(source)
        self.tracker = next(each for each in self.environment.iter_extensions() if isinstance(each, Generation))
        self.variables = variables

    def row(
        self,
        messages: list[Any],
        tools: list[Any] | None,
        ask: bool,
        cuts: list[tuple[int, bool]],
        kwargs: dict[str, Any],
        as_served: bool = False,
    ) -> list[Any]:
        """Return [text, spans, cuts]: the whole conversation, its generation spans, and each cut compared with it.

        A cut is answered by (its length, how many of its first characters the whole text begins with). With
        `as_served`, a text that does not begin with the last prompt is put together of that prompt and the answer.
        """
        spans: list[tuple[int, int]] = []
        text = self.render(messages, tools, ask, kwargs, spans)
        compared = self.compared(text, messages, tools, cuts, kwargs)
        asked = [place for place, (_, asks) in enumerate(cuts) if asks]
        if as_served and asked and compared[asked[-1]][1] < compared[asked[-1]][0]:
            served = self.served(text, messages, tools, cuts[asked[-1]][0], kwargs)
            if served is not None:
                return [served, [], self.compared(served, messages, tools, cuts, kwargs)]
        return [text, spans, compared]

    def compared(
        self,
        text: str,
        messages: list[Any],
        tools: list[Any] | None,
        cuts: list[tuple[int, bool]],
        kwargs: dict[str, Any],
    ) -> list[tuple[int, int]]:
        """Return for each cut its length, and how many of its first characters `text` begins with."""
        parts = (self.render(messages[:count], tools, asks, kwargs) for count, asks in cuts)
        return [(len(part), common(text, part)) for part in parts]

    def served(
        self, text: str, messages: list[Any], tools: list[Any] | None, place: int, kwargs: dict[str, Any]
    ) -> str | None:
        """Return the prompt before message `place`, the last one, and what the template writes for that message.

        Some templates leave reasoning out of turns before an answer once that answer stands in the conversation;
        serving asks for the answer before it stands there. None when `text` does not end in the same answer.
        """
        opening = [{"role": "user", "content": "?"}]
        try:
            prompt = self.render(messages[:place], tools, True, kwargs)
            asked = self.render(opening, tools, True, kwargs)
            whole = self.render([*opening, *messages[place:]], tools, False, kwargs)
        except ROW_ERRORS:
            return None
        answer = whole[len(asked) :]
        return prompt + answer if whole.startswith(asked) and answer and text.endswith(answer) else None

    def render(
        self,
        messages: list[Any],
        tools: list[Any] | None,
        ask: bool,
        kwargs: dict[str, Any],
        spans: list[tuple[int, int]] | None = None,
    ) -> str:
        """Return the text of `messages`. `spans` receives the character ranges of generation blocks."""
        blocks: list[str] = []
        with self._tracked(blocks, spans), _timed(self.seconds):
            context = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": ask}
            for block in self.template.generate({**self.variables, **kwargs, **context}):
                blocks.append(block)
        return "".join(blocks)

    @contextmanager
    def _tracked(self, blocks: list[str], spans: list[tuple[int, int]] | None) -> Iterator[None]:
        self.tracker.blocks, self.tracker.marks = blocks, spans
        try:
            yield
        finally:
            self.tracker.blocks = self.tracker.marks = None


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    # CPU time and not wall time: a busy machine must not make a harmless template look hostile
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def common(text: str, part: str) -> int:
    """Return the length of the common prefix of `part` and `text`."""
    if text.startswith(part):
        return len(part)
    low, high = 0, len(part)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if text.startswith(part[:middle]) else (low, middle)
    return low


def _answers(renderings: Renderings, requests: list[Any]) -> list[list[Any]]:
    answers, characters = [], 0
    for request in requests:
        answer = _answer(renderings, request)
        characters += len(answer[0])
        # the parent has no bounds of its own: what reaches it must be small
        answers.append(answer if characters <= MAX_CHARACTERS else ["unbounded", "MemoryError"])
    return answers


def _answer(renderings: Renderings, request: list[Any]) -> list[Any]:
    try:
        return renderings.row(*request)
    except UNBOUNDED_ERRORS as error:
        return ["unbounded", type(error).__name__]
    except ROW_ERRORS as error:
        return ["refused", f"{error}"[:300] or type(error).__name__]


def _read(stream: BinaryIO) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        return None
    return json.loads(stream.read(int.from_bytes(head, "little")).decode("utf-8", "surrogatepass"))


def _write(stream: BinaryIO, answer: Any) -> None:
    body = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    stream.write(len(body).to_bytes(8, "little") + body)
    stream.flush()


def _bound(max_bytes: int) -> None:
    if sys.platform == "linux":  # macOS knows the limit by name only
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main() -> None:
    """Compile the template of the first frame, then answer frames until stdin closes."""
    incoming, outgoing = sys.stdin.buffer, sys.stdout.buffer
    source, variables, now, max_bytes, seconds = _read(incoming)
    _bound(max_bytes)
    try:
        with _timed(seconds):
            renderings = Renderings(source, variables, datetime.fromisoformat(now), seconds)
    except UNBOUNDED_ERRORS as error:
        return _write(outgoing, ["unbounded", type(error).__name__])
    except ROW_ERRORS as error:
        return _write(outgoing, ["refused", f"{error}"[:300]])
    _write(outgoing, ["ready", renderings.marks_generation, renderings.reads])
    while (requests := _read(incoming)) is not None:
        _write(outgoing, _answers(renderings, requests))
    return None


if __name__ == "__main__":
    main()
