"""Where the assistant speaks in a rendered conversation: supervised spans, each ending with its stop token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.template_problems import CONTENT_CHANGED, NOT_PREFIX_STABLE, PROMPT_DIFFERS
from lorafit.data.template_renderer import Rendering
from lorafit.data.template_row import LaidOut, Span, answers_in


@dataclass(frozen=True)
class Ending:
    """How the template ends an answer, learnt from a probe (template_probe.py).

    `closing` is what stands from the answer's last character through the stop token, `after` what follows it
    (a newline, say), and `overhang` how far a `{% generation %}` block reaches beyond the stop token (negative
    when the block ends before it). `tokens` can end a turn that ends otherwise (a tool call).
    """

    closing: str
    after: str
    overhang: int
    tokens: tuple[str, ...]


def _asked(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Where the assistant answers something: what it says before anybody else has no prompt to learn it for."""
    return [place for place in answers_in(messages) if place]


def cuts_of(messages: Sequence[Mapping[str, Any]]) -> list[tuple[int, bool]]:
    """What to render beside the whole conversation: the prompt of each answer, and the text up to each but the last."""
    answers = _asked(messages)
    prompts = [(place, True) for place in answers]
    return prompts + [(place + 1, False) for place in answers[:-1]]


def by_prefix(rendering: Rendering, messages: Sequence[Mapping[str, Any]], ending: Ending) -> LaidOut:
    """Spans by prefix difference: an answer begins where its prompt ends, verified by rendering each prefix.

    When an earlier answer is rendered otherwise once the conversation goes on, only the last is supervised.
    """
    answers = _asked(messages)
    text = rendering.text
    prompts = rendering.cuts[: len(answers)]
    ends = [*rendering.cuts[len(answers) :], (len(text), len(text))]
    spans = [_span(text, prompt, end, ending) for prompt, end in zip(prompts, ends)]
    problems = []
    if any(span is None for span in spans[:-1]):
        problems.append(NOT_PREFIX_STABLE)
        answers, spans = answers[-1:], spans[-1:]
    if spans and spans[-1] is None:
        # what serving sends is not what this text begins with: supervise from where they part
        problems.append(PROMPT_DIFFERS)
        spans[-1] = _span(text, (prompts[-1][1],) * 2, ends[-1], ending)
    kept = [span for span in spans if span is not None]
    if any(not _says(text, span, messages[place]) for span, place in zip(kept, answers)):
        problems.append(CONTENT_CHANGED)
    return LaidOut(text, tuple(kept), tuple(problems))


def _span(text: str, prompt: tuple[int, int], upto: tuple[int, int], ending: Ending) -> Span | None:
    """The span of one answer, or None when the whole text does not contain it as its own prefix has it."""
    start, shared = prompt
    length, common = upto
    if shared < start:
        return None
    stop = length - len(ending.after)
    if stop <= common and text.endswith(ending.closing, start, stop):
        return (start, stop)
    return (start, _trimmed(text, start, length)) if common == length else None


def _trimmed(text: str, start: int, end: int) -> int:
    """The end of `text[start:end]` without its trailing blanks, for turns with an ending of their own."""
    return start + len(text[start:end].rstrip())


def by_blocks(rendering: Rendering, messages: Sequence[Mapping[str, Any]], ending: Ending) -> LaidOut:
    """Spans from the template's own `{% generation %}` blocks, each made to end right after its stop token."""
    text = rendering.text
    spans = tuple((start, _block_end(text, start, end, ending)) for start, end in rendering.spans if end > start)
    answers = answers_in(messages)
    paired = zip(spans, answers) if len(spans) == len(answers) else ()
    changed = any(not _says(text, span, messages[place]) for span, place in paired)
    return LaidOut(text, spans, (CONTENT_CHANGED,) if changed else ())


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


def _says(text: str, span: Span, message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    if not isinstance(content, str) or not content:
        return True
    shown = text[slice(*span)]
    return content in shown or "".join(content.split()) in "".join(shown.split())
