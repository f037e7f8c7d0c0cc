"""What a chat template does with a plain question and answer: how it ends a turn, and which token stops it."""

from __future__ import annotations

from dataclasses import dataclass

from lorafit.data.template_problems import PROMPT_DIFFERS, PROMPT_SPLIT
from lorafit.data.template_renderer import Refusal, Rendering, Request, TemplateRenderer
from lorafit.data.template_row import Message
from lorafit.data.template_turns import Ending, cuts_of
from lorafit.data.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

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
