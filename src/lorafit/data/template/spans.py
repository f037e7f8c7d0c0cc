"""Spans: the answers in a rendered row, by prefix difference or by the template's `{% generation %}` blocks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.schema.records import CALLS, REASONING
from lorafit.data.template.layout import (
    ANSWER_EMPTY,
    CONTENT_CHANGED,
    NOT_PREFIX_STABLE,
    PROMPT_DIFFERS,
    LaidOut,
    Span,
    answers_in,
)
from lorafit.data.template.renderer import Rendering


@dataclass(frozen=True)
class Ending:
    """The end of an answer under one template, found by a probe (probe.py).

    `closing` is what stands from the answer's last character through the stop token, `after` what follows it
    (a newline, say), and `overhang` how far a `{% generation %}` block reaches beyond the stop token (negative
    when the block ends before it). `tokens` can end a turn that ends otherwise (a tool call).
    """

    closing: str
    after: str
    overhang: int
    tokens: tuple[str, ...]


def cuts_of(messages: Sequence[Mapping[str, Any]], taught: Sequence[int]) -> list[tuple[int, bool]]:
    """Return the prefixes to render beside the whole conversation: up to each answer to learn, and up to its end.

    An answer before which nothing stands has no prompt to learn it for; the last one ends with the conversation.
    """
    asked = [place for place in taught if place]
    ends = [place + 1 for place in asked if place + 1 < len(messages)]
    return [(place, True) for place in asked] + [(end, False) for end in ends]


def by_prefix(
    rendering: Rendering, messages: Sequence[Mapping[str, Any]], taught: Sequence[int], ending: Ending
) -> LaidOut:
    """Find spans by prefix difference: an answer begins where its prompt ends. Each prefix is rendered to verify it.

    When an earlier answer is rendered otherwise once the conversation goes on, only the last is supervised.
    """
    answers = [place for place in taught if place]
    text = rendering.text
    prompts = rendering.cuts[: len(answers)]
    ends = [*rendering.cuts[len(answers) :], (len(text), len(text))][: len(answers)]
    spans = [_span(text, prompt, end, ending) for prompt, end in zip(prompts, ends)]
    problems, lost = [], []
    if any(span is None for span in spans[:-1]):
        problems.append(NOT_PREFIX_STABLE)
        lost = [_said(messages[place]) for place in answers[:-1]]
        answers, spans = answers[-1:], spans[-1:]
    if spans and spans[-1] is None:
        # what serving sends is not what this text begins with: supervise from where they part
        problems.append(PROMPT_DIFFERS)
        spans[-1] = _span(text, (prompts[-1][1],) * 2, ends[-1], ending)
    kept = [span for span in spans if span is not None]
    if any(not _says(text, span, messages[place]) for span, place in zip(kept, answers)):
        problems.append(CONTENT_CHANGED)
    if any(_is_bare(text, span, messages[place], ending) for span, place in zip(kept, answers)):
        problems.append(ANSWER_EMPTY)
    return LaidOut(text, tuple(kept), tuple(problems), lost=tuple(lost))


def _said(message: Mapping[str, Any]) -> str:
    calls = [json.dumps(call, default=str) for call in message.get(CALLS, ())]
    return "\n".join([message.get(REASONING) or "", message.get("content") or "", *calls])


def _span(text: str, prompt: tuple[int, int], upto: tuple[int, int], ending: Ending) -> Span | None:
    """Return the span of one answer, or None if the whole text does not contain it as its own prefix does."""
    start, shared = prompt
    length, common = upto
    if shared < start:
        return None
    stop = length - len(ending.after)
    if stop <= common and text.endswith(ending.closing, start, stop):
        return (start, stop)
    return (start, _trimmed(text, start, length)) if common == length else None


def _trimmed(text: str, start: int, end: int) -> int:
    """Return the end of `text[start:end]` without its trailing blanks, for turns with their own ending."""
    return start + len(text[start:end].rstrip())


def block_cuts(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, bool]]:
    """Return the prefixes to render beside a conversation with generation blocks: the prompt of every answer."""
    return [(place, True) for place in answers_in(messages) if place]


def by_blocks(
    rendering: Rendering, messages: Sequence[Mapping[str, Any]], taught: Sequence[int], ending: Ending
) -> LaidOut:
    """Find spans by the template's `{% generation %}` blocks, from the end of the served prompt to the stop token."""
    text, problems = rendering.text, []
    answers = answers_in(messages)
    blocks = [(start, _block_end(text, start, end, ending)) for start, end in rendering.spans if end > start]
    asked = [place for place in answers if place]
    prompts = dict(zip(asked, rendering.cuts))
    begins = {place: length for place, (length, shared) in prompts.items() if length == shared}
    owners = _owners(blocks, answers, begins)
    if taught and taught[-1] in prompts and taught[-1] not in begins:
        problems.append(PROMPT_DIFFERS)
    spans = []
    for (start, end), owner in zip(blocks, owners):
        begin = max(start, begins.get(owner, 0)) if owner is not None else start
        is_taught = owner in taught if owner is not None else len(taught) == len(answers)
        # as by prefixes, an answer before which nothing stands has no prompt to learn it for
        if is_taught and owner != 0 and begin < end:
            spans.append((begin, end))
            if owner is not None and not _says(text, (begin, end), messages[owner]):
                problems.append(CONTENT_CHANGED)
            if owner is not None and _is_bare(text, (begin, end), messages[owner], ending):
                problems.append(ANSWER_EMPTY)
    return LaidOut(text, tuple(spans), tuple(dict.fromkeys(problems)))


def _owners(blocks: Sequence[Span], answers: Sequence[int], begins: Mapping[int, int]) -> list[int | None]:
    """Return the answer of each block: by order, or else by the ends of the prompts; None if unknown."""
    if len(blocks) == len(answers):
        return list(answers)
    if len(begins) < sum(place > 0 for place in answers):
        return [None] * len(blocks)
    return [max((place for place, begin in begins.items() if begin < end), default=None) for _, end in blocks]


def _block_end(text: str, start: int, end: int, ending: Ending) -> int:
    known = end - ending.overhang
    if text.endswith(ending.closing, start, known):
        return known
    trimmed = _trimmed(text, start, end)
    if text.endswith(ending.tokens, start, trimmed):
        return trimmed
    place = _trimmed(text, 0, end) if text[end:].isspace() else len(text) - len(text[end:].lstrip())
    found = [len(token) for token in ending.tokens if text.startswith(token, place)]
    return place + max(found) if found else end


def _is_bare(text: str, span: Span, message: Mapping[str, Any], ending: Ending) -> bool:
    """Return True if the span holds only the stop token although the answer has a text or a call."""
    if not message.get(CALLS) and not (message.get("content") or "").strip():
        return False
    shown = text[slice(*span)].rstrip()
    closing = next((each for each in (ending.closing, *ending.tokens) if each and shown.endswith(each)), "")
    return not shown.removesuffix(closing).strip()


def _says(text: str, span: Span, message: Mapping[str, Any]) -> bool:
    """Return True if the span contains the answer.

    Blanks around it are ignored, but not the first line's indentation.
    """
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return True
    shown = text[slice(*span)]
    if content in shown:
        return True
    if INDENTED.match(content) and content.lstrip("\n") not in shown:
        return False
    return "".join(content.split()) in "".join(shown.split())


INDENTED = re.compile(r"\n*(?:[^\S\n ]|  )[^\S\n]*\S")
"""Text whose first line begins with two blanks, a tab, or a blank of another script, as U+3000 in Japanese."""
