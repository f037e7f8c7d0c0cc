"""ChatLayout: rows rendered by a base's own chat template in a bounded child, with the spans of their answers."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.data.schema.records import CALLS, Record
from lorafit.data.template.completeness import Outline, RunTarget, missing_marks, missing_words, outline, twin
from lorafit.data.template.layout import (
    CONTENT_CHANGED,
    KWARGS_UNREAD,
    MAX_ROW_CHARACTERS,
    REFUSED,
    TEXT_MISSING,
    TOO_LARGE,
    TOOLS_IGNORED,
    LaidOut,
    Message,
    characters_in,
    cleaned,
    document_of,
    messages_of,
)
from lorafit.data.template.probe import probe
from lorafit.data.template.renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.template.single_calls import with_calls_apart
from lorafit.data.template.spans import block_cuts, by_blocks, by_prefix, cuts_of
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

FIELD_MARK = "Zq9field"
MENTIONS_CALLS = re.compile(r"\btool_calls\b")


class ChatLayout:
    """Lay rows out with a Jinja chat template. Raises TemplateError if it cannot render a plain conversation."""

    def __init__(self, source: str, tokenizer: TextTokenizer) -> None:
        self.source = source
        self._renderer = TemplateRenderer(source, tokenizer.named)
        self._probe = probe(self._renderer, tokenizer)
        self._reading = self._probe.reading
        self.stop_ids = self._probe.stop_ids
        self.problems = self._probe.problems
        self._shows_tools = "tools" in self._renderer.reads
        self._shows_calls = bool(MENTIONS_CALLS.search(source))
        self._bos = tokenizer.bos_token or "" if tokenizer.adds_bos else ""
        self._eos = tokenizer.eos_token or tokenizer.token_of(self.stop_ids[0]) or ""
        self._unmarked: dict[Outline, tuple[RunTarget, ...]] = {}

    def lay_out(self, records: Iterable[Record], use: Callable[[list[LaidOut]], None]) -> None:
        """Pass the text and supervised spans of every record to `use`, in order, chunk by chunk.

        Raises TemplateError when the template exceeds its time or memory on a record.
        """
        pending: deque[_Asked] = deque()

        def requests() -> Iterator[Request]:
            known = set(self._unmarked)
            for record in records:
                asked = self._asked(record)
                if asked.outline is not None and asked.outline not in known:
                    known.add(asked.outline)
                    marked = replace(asked, messages=twin(asked.messages), is_twin=True)
                    pending.append(marked)
                    yield self._request(marked)
                pending.append(asked)
                yield self._request(asked)

        def answered(answers: list[Rendering | Refusal]) -> None:
            laid = [self._laid(answer, pending.popleft()) for answer in answers]
            use([row for row in laid if row is not None])

        self._renderer.render_many(requests(), answered)

    def render(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool, tools: Iterable[Any] = ()
    ) -> str:
        """Return the text of `messages`. Raises TemplateError if the template refuses them."""
        written = self._reading.written(self._reading.fitted(cleaned(messages)).messages)
        answer = self._renderer.render(Request(written, tuple(tools), add_generation_prompt))
        if isinstance(answer, Refusal):
            raise TemplateError(
                f"the chat template refuses the conversation ({answer.reason})", fix="check the roles and their order"
            )
        return answer.text

    def with_calls_apart(self, record: Record) -> Record:
        """Return the record with one call a turn if the template takes only one; else the same object."""
        return with_calls_apart(record) if self._reading.single_calls else record

    def shows_turn_field(self, name: str) -> bool:
        """Return True if the rendered text contains the value of a turn's extra field, as `name`."""
        turns = [{"role": role, "content": "a", name: FIELD_MARK} for role in ("user", "assistant")]
        answer = self._renderer.render(Request(turns))
        return isinstance(answer, Rendering) and FIELD_MARK in answer.text

    def _request(self, asked: _Asked) -> Request:
        if asked.outline is None:
            return Request(())  # nothing to render, but an answer to keep the order
        messages, taught = asked.messages, asked.taught
        cuts = block_cuts(messages) if self._probe.marks_blocks else cuts_of(messages, taught)
        record = asked.record
        return Request(
            self._reading.written(messages),
            record.tools,
            cuts=cuts,
            where=record.source,
            kwargs=record.template_kwargs,
            as_served=not self._probe.marks_blocks,
        )

    def _asked(self, record: Record) -> _Asked:
        """Return what to render for the record, in the form that the template takes."""
        if record.is_document:
            return _Asked(record, [])
        messages, taught = messages_of(record)
        if characters_in(messages) > MAX_ROW_CHARACTERS:
            return _Asked(record, messages)
        fitted = self._reading.fitted(messages)
        if fitted.places:
            taught = [
                place
                for place, before in enumerate(fitted.places)
                if before in taught and fitted.messages[place]["role"] == "assistant"
            ]
        seen = outline(fitted.messages, bool(record.tools), record.template_kwargs)
        return _Asked(record, fitted.messages, taught, seen, fitted.changed, fitted.places)

    def _laid(self, answer: Rendering | Refusal, asked: _Asked) -> LaidOut | None:
        record, messages = asked.record, asked.messages
        if asked.is_twin:
            assert asked.outline is not None, "a twin has the outline of its row"
            self._unmarked[asked.outline] = _unmarked(answer, messages)
            return None
        if record.is_document:
            return document_of(record, self._bos, self._eos)
        if asked.outline is None:
            return LaidOut("", problems=(TOO_LARGE,))
        if isinstance(answer, Refusal):
            return LaidOut("", problems=(REFUSED,), detail=answer.reason)
        spans_of = by_blocks if self._probe.marks_blocks else by_prefix
        laid = spans_of(answer, messages, asked.taught, self._probe.ending)
        return self._with_what_is_missing(laid, asked)

    def _with_what_is_missing(self, laid: LaidOut, asked: _Asked) -> LaidOut:
        """Return the row with a problem for each text, call and tool that the template leaves out."""
        assert asked.outline is not None, "only rendered rows are looked through"
        messages, problems, detail = asked.messages, [*laid.problems, *asked.changed], laid.detail
        if self._drops_tools(asked.record, messages, laid.text):
            problems.append(TOOLS_IGNORED)
        if unread := sorted(set(asked.record.template_kwargs) - self._renderer.reads):
            problems.append(KWARGS_UNREAD)
            detail = detail or f"the template does not read '{unread[0]}'"
        missing = self._missing(laid, asked)
        if missing:
            prompted = sorted(place for place in missing if messages[place[0]]["role"] != "assistant")
            first, part = (prompted or sorted(missing))[0]
            problems.append(TEXT_MISSING if prompted else CONTENT_CHANGED)
            if prompted and len(prompted) < len(missing):
                problems.append(CONTENT_CHANGED)
            before = asked.places[first] if asked.places else first
            detail = _named(asked.record, before, messages[first]["role"], part)
        if problems == list(laid.problems):
            return laid
        return replace(laid, problems=tuple(dict.fromkeys(problems)), detail=detail)

    def _missing(self, laid: LaidOut, asked: _Asked) -> set[RunTarget]:
        """Return the parts that the template leaves out, except in answers that this row does not teach."""
        assert asked.outline is not None, "only rendered rows are looked through"
        unmarked, messages = self._unmarked[asked.outline], asked.messages
        missing = {*unmarked, *missing_words(laid.text, messages)}
        if not missing:
            return missing
        lost = asked.taught[:-1] if laid.lost else ()
        answers = {place for place, message in enumerate(messages) if message["role"] == "assistant"}
        context = answers - set(asked.taught)
        return {
            (place, part)
            for place, part in missing
            if place not in lost and (place not in context or ((place, part) in unmarked and part != "reasoning"))
        }

    def _drops_tools(self, record: Record, messages: list[Message], text: str) -> bool:
        if not self._shows_calls and any(CALLS in message for message in messages):
            return True
        names = [tool.get("function", tool).get("name") for tool in record.tools]
        return bool(names) and (not self._shows_tools or any(name and name not in text for name in names))


@dataclass(frozen=True, slots=True)
class _Asked:
    """One pending request: the row's messages, the answers to learn, its outline, and what was changed in it."""

    record: Record
    messages: list[Message]
    taught: Sequence[int] = ()
    outline: Outline | None = None
    changed: tuple[str, ...] = ()
    places: Sequence[int] = ()
    is_twin: bool = False


def _unmarked(answer: Rendering | Refusal, messages: Sequence[Message]) -> tuple[RunTarget, ...]:
    # a template that refuses marked texts may take the row itself: its own words are looked for then
    return () if isinstance(answer, Refusal) else missing_marks(answer.text, messages)


def _named(record: Record, place: int, role: str, part: str) -> str:
    """Return the name of a part that is left out. Turns are counted as in the row."""
    if record.system and place == 0:
        return "the template leaves out the system text"
    number = place + (0 if record.system else 1)
    what = {"text": "text", "reasoning": "reasoning", "call": "call"}[part]
    return f"the template leaves out the {what} of turn {number} ({role})"
