"""Probe: facts about a chat template, found once by rendering: the end of answers, and faults of every row."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.data.template.layout import PROMPT_DIFFERS, PROMPT_SPLIT, Message
from lorafit.data.template.reading import ANSWER, QUESTION, Reading, reading_of
from lorafit.data.template.renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.template.spans import Ending, cuts_of
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
    return Probe(ending, _stop_ids(stop, tokenizer), block_end is not None, problems, reading_of(renderer))


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


def _stop_ids(stop: int | None, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Return the turn's own stop token first, then EOS, which ends a text under any template."""
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
