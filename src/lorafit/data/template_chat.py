"""A base's own chat template: rendered in the bounded child, with the answers' spans found in the text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from lorafit.data.records import Record
from lorafit.data.template_probe import probe
from lorafit.data.template_problems import REFUSED, TOO_LARGE, TOOLS_IGNORED
from lorafit.data.template_renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.template_row import MAX_ROW_CHARACTERS, LaidOut, Message, characters_in, cleaned, messages_of
from lorafit.data.template_turns import by_blocks, by_prefix, cuts_of
from lorafit.data.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

MENTIONS_CALLS = re.compile(r"\btool_calls\b")


class ChatLayout:
    """Lays rows out with a Jinja chat template. Raises TemplateError when it cannot render a plain conversation."""

    def __init__(self, source: str, tokenizer: TextTokenizer) -> None:
        self.source = source
        self._renderer = TemplateRenderer(source, tokenizer.named)
        self._probe = probe(self._renderer, tokenizer)
        self.stop_ids = self._probe.stop_ids
        self.problems = self._probe.problems
        self._shows_tools = "tools" in self._renderer.reads
        self._shows_calls = bool(MENTIONS_CALLS.search(source))

    def lay_out(self, records: Iterable[Record], use: Callable[[list[LaidOut]], None]) -> None:
        """Hand `use` the text and supervised spans of every record in order, chunk by chunk.

        Raises TemplateError when the template exceeds its time or memory on a record.
        """
        pending: deque[tuple[Record, list[Message] | None]] = deque()

        def requests() -> Iterator[Request]:
            for record in records:
                messages = messages_of(record)
                fits = characters_in(messages) <= MAX_ROW_CHARACTERS
                pending.append((record, messages if fits else None))
                yield self._request(record, messages) if fits else Request(())

        def answered(answers: list[Rendering | Refusal]) -> None:
            use([self._laid(answer, *pending.popleft()) for answer in answers])

        self._renderer.render_many(requests(), answered)

    def render(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool, tools: Iterable[Any] = ()
    ) -> str:
        """The text of `messages`. Raises TemplateError when the template refuses them."""
        answer = self._renderer.render(Request(cleaned(messages), tuple(tools), add_generation_prompt))
        if isinstance(answer, Refusal):
            raise TemplateError(
                f"the chat template refuses the conversation ({answer.reason})", fix="check the roles and their order"
            )
        return answer.text

    def _request(self, record: Record, messages: list[Message]) -> Request:
        cuts = () if self._probe.marks_blocks else cuts_of(messages)
        return Request(messages, record.tools, cuts=cuts, where=record.source)

    def _laid(self, answer: Rendering | Refusal, record: Record, messages: list[Message] | None) -> LaidOut:
        if messages is None:
            return LaidOut("", problems=(TOO_LARGE,))
        if isinstance(answer, Refusal):
            return LaidOut("", problems=(REFUSED,), detail=answer.reason)
        spans_of = by_blocks if self._probe.marks_blocks else by_prefix
        laid = spans_of(answer, messages, self._probe.ending)
        if self._drops_tools(record, messages):
            return LaidOut(laid.text, laid.spans, (*laid.problems, TOOLS_IGNORED))
        return laid

    def _drops_tools(self, record: Record, messages: list[Message]) -> bool:
        calls = not self._shows_calls and any("tool_calls" in message for message in messages)
        return calls or (bool(record.tools) and not self._shows_tools)
