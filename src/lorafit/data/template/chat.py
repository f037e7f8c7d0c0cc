"""A base's own chat template: rendered in the bounded child, with the answers' spans found in the text."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.data.schema.records import Record
from lorafit.data.template.layout import (
    CONTENT_CHANGED,
    MAX_ROW_CHARACTERS,
    NOT_PREFIX_STABLE,
    PROMPT_DIFFERS,
    PROMPT_SPLIT,
    REFUSED,
    TOO_LARGE,
    TOOLS_IGNORED,
    LaidOut,
    Message,
    Span,
    answers_in,
    characters_in,
    cleaned,
    messages_of,
)
from lorafit.data.template.renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError


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


QUESTION, ANSWER = "What is it?", "Zq7xk"
# how answers begin, one of each kind that pre-tokenizers treat apart
FIRST_WORDS = ("Yes", "no", "12", "é", "中", '"x"', "{", "- a", "<b>")


@dataclass(frozen=True)
class Probe:
    """What was learnt: the `ending` of answers, the tokens that stop one, and what is wrong with every row."""

    ending: Ending
    stop_ids: tuple[int, ...]
    marks_blocks: bool
    problems: tuple[str, ...]


def probe(renderer: TemplateRenderer, tokenizer: TextTokenizer) -> Probe:
    """Render a plain question and answer and see. Raises TemplateError when the template cannot show them."""
    rendering = _rendered(renderer, ANSWER)
    start = rendering.text.rfind(ANSWER)
    if start < 0:
        raise TemplateError(
            "the chat template does not show the assistant's answer", fix="use a base with a chat template for text"
        )
    end = start + len(ANSWER)
    stop, stop_end = _stop_in(rendering.text, end, tokenizer)
    block_end = next((last for first, last in rendering.spans if first <= start < last), None)
    ending = Ending(
        closing=rendering.text[end:stop_end],
        after=rendering.text[stop_end:],
        overhang=0 if block_end is None else block_end - stop_end,
        tokens=tuple(tokenizer.added_tokens[token_id] for token_id in sorted(enders_of(tokenizer))),
    )
    prompt_length, shared = rendering.cuts[0]
    problems = (PROMPT_DIFFERS,) if shared < prompt_length else ()
    if not problems and _splits_otherwise(renderer, tokenizer):
        problems = (PROMPT_SPLIT,)
    return Probe(ending, _stop_ids(stop, tokenizer), block_end is not None, problems)


def enders_of(tokenizer: TextTokenizer) -> frozenset[int]:
    """Special tokens that could end a turn; blanks (Gemma has tokens of newlines) could not."""
    return frozenset(each for each in tokenizer.special_ids if tokenizer.added_tokens[each].strip())


def _rendered(renderer: TemplateRenderer, answer: str) -> Rendering:
    messages: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    found = renderer.render(Request(messages, cuts=cuts_of(messages)))
    if isinstance(found, Refusal):
        raise TemplateError(
            f"the chat template refuses a plain question and answer ({found.reason})",
            fix="mend chat_template in the base's tokenizer",
        )
    return found


def _stop_in(text: str, start: int, tokenizer: TextTokenizer) -> tuple[int | None, int]:
    """(id of the first added token at or after `start`, where it ends), or (None, start) when there is none."""
    encoding = tokenizer.encodings([text])[0]
    for token_id, (_, last) in zip(encoding.ids, encoding.offsets):
        token = tokenizer.added_tokens.get(token_id, "")
        if last > start and token.strip():
            return token_id, text.index(token, start) + len(token)
    return None, start


def _stop_ids(stop: int | None, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The turn's own stop token first, then EOS, which ends a text whatever the template."""
    found = [token_id for token_id in (stop, tokenizer.eos_id) if token_id is not None]
    if not found:
        raise TemplateError(
            "the chat template ends answers with no special token, and the tokenizer has no EOS",
            fix="choose a base whose tokenizer_config.json names an eos_token",
        )
    return tuple(dict.fromkeys(found))


def _splits_otherwise(renderer: TemplateRenderer, tokenizer: TextTokenizer) -> bool:
    for word in FIRST_WORDS:
        rendering = _rendered(renderer, word)
        prompt = tokenizer.encode(rendering.text[: rendering.cuts[0][0]])
        if tokenizer.encode(rendering.text)[: len(prompt)] != prompt:
            return True
    return False


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
