"""Probe: facts about a chat template, found once by rendering: the end of answers, and faults of every row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lorafit.data.schema.records import CALLS, REASONING
from lorafit.data.template.layout import PROMPT_DIFFERS, PROMPT_SPLIT, Message, answers_in
from lorafit.data.template.reading import ANSWER, CALLED_TOOL, QUESTION, REASON, Reading, call_of, reading_of
from lorafit.data.template.renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.template.spans import Ending, block_cuts, by_blocks, by_prefix, cuts_of
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

# how answers begin, one of each kind that pre-tokenizers treat apart
FIRST_WORDS = ("Yes", "no", "12", "é", "中", '"x"', "{", "- a", "<b>")


@dataclass(frozen=True)
class Probe:
    """Facts about a template: the `ending` of answers, the stop tokens, and the problems of every row."""

    ending: Ending
    stop_ids: tuple[int, ...]
    marks_blocks: bool
    problems: tuple[str, ...]
    reading: Reading


def probe(renderer: TemplateRenderer, tokenizer: TextTokenizer) -> Probe:
    """Render a plain question and answer, and return the facts.

    Raises TemplateError if the template cannot show them.
    """
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
    reading, marks_blocks = reading_of(renderer), block_end is not None
    answers = list(_probed_answers(renderer, reading, ending, marks_blocks))
    stop_ids = _stop_ids(stop, tokenizer, answers)
    return Probe(ending, stop_ids, marks_blocks, problems, reading)


def enders_of(tokenizer: TextTokenizer) -> frozenset[int]:
    """Return the special tokens that could end a turn. Blanks could not (Gemma has tokens of newlines)."""
    return frozenset(each for each in tokenizer.special_ids if tokenizer.added_tokens[each].strip())


def _rendered(renderer: TemplateRenderer, answer: str) -> Rendering:
    messages: list[Message] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    found = renderer.render(Request(messages, cuts=cuts_of(messages, [1])))
    if isinstance(found, Refusal):
        raise TemplateError(
            f"the chat template refuses a plain question and answer ({found.reason})",
            fix="mend chat_template in the base's tokenizer",
        )
    return found


def _stop_in(text: str, start: int, tokenizer: TextTokenizer) -> tuple[int | None, int]:
    """Return (id of the first added token at or after `start`, its end), or (None, start)."""
    encoding = tokenizer.encodings([text])[0]
    for token_id, (_, last) in zip(encoding.ids, encoding.offsets):
        token = tokenizer.added_tokens.get(token_id, "")
        if last > start and token.strip():
            return token_id, text.index(token, start) + len(token)
    return None, start


def _probed_answers(renderer: TemplateRenderer, reading: Reading, ending: Ending, marks_blocks: bool) -> Iterator[str]:
    """Yield the supervised text of each kind of answer that the template shows: with reasoning, calls, or both."""
    call, thought = call_of("Zq7xkWv5t"), {REASONING: REASON}
    said: list[Message] = [
        {"content": ANSWER, **thought},
        *({"content": text, CALLS: [call], **more} for text in ("", ANSWER) for more in ({}, thought)),
        {"content": "", CALLS: [call, call_of("Kd8rwpZq7")]},
    ]
    ask: Message = {"role": "user", "content": QUESTION}
    talks = [[ask, {"role": "assistant", **one}] for one in said]
    if marks_blocks:  # an earlier answer is supervised as it is shown, even if its end is its own
        result = {"role": "tool", "name": "probe", "content": ANSWER, "tool_call_id": "Zq7xkWv5t"}
        last: Message = {"role": "assistant", "content": ANSWER}
        talks += [[*talks[1], result, last], [ask, last, ask, last]]
    for talk in talks:
        messages = reading.fitted(talk).messages
        taught = answers_in(messages)
        cuts = block_cuts(messages) if marks_blocks else cuts_of(messages, taught)
        written: list[Any] = reading.written(messages)
        rendering = renderer.render(Request(written, (CALLED_TOOL,), cuts=cuts))
        if isinstance(rendering, Rendering):
            laid = (by_blocks if marks_blocks else by_prefix)(rendering, messages, taught, ending)
            yield from (laid.text[start:end] for start, end in laid.spans)


def _stop_ids(stop: int | None, tokenizer: TextTokenizer, answers: list[str]) -> tuple[int, ...]:
    """Return the turn's own stop token first, then EOS, then the tokens that end other kinds of answers.

    EOS ends a text under any template. A token that also stands inside an answer, as one between two calls, ends none.
    """
    found = [token_id for token_id in (stop, tokenizer.eos_id) if token_id is not None]
    encoded = [ids for text in answers if (ids := tokenizer.encode(text.rstrip()))]
    inside = {token_id for ids in encoded for token_id in ids[:-1]}
    enders = enders_of(tokenizer) - inside
    found += [ids[-1] for ids in encoded if ids[-1] in enders]
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
