"""Layout: from a row's messages to text with supervised spans; the loss mask; the fallback template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import Encoding

from lorafit.data.schema.records import CALLS, REASONING, Record
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError

STOP_MISSING = "stop-missing"
"""A supervised answer is not followed by a token that ends the turn: the model would not learn to stop."""

BOS_DOUBLED = "bos-doubled"
"""The row starts with BOS twice: serving sends it once."""

REFUSED = "refused"
"""The chat template raised an error on this row; `Encoded.detail` holds its words, and there are no ids."""

NOT_PREFIX_STABLE = "not-prefix-stable"
"""The template renders earlier answers differently once the conversation goes on: only the last one is supervised."""

PROMPT_DIFFERS = "prompt-differs"
"""The prompt that serving would send is not how the training text begins."""

CONTENT_CHANGED = "content-changed"
"""The template dropped or rewrote (part of) an answer; white space around it does not count."""

ANSWER_EMPTY = "answer-empty"
"""The template shows nothing of an answer but its end, a call for instance: the model would learn to say nothing."""

STRADDLED = "straddled"
"""A token covers the prompt's end and the answer's start: it is not supervised, and serving splits it otherwise."""

PROMPT_SPLIT = "prompt-split"
"""The tokenizer splits this template's prompt otherwise when an answer follows: true of every row."""

TOOLS_IGNORED = "tools-ignored"
"""The row has tools or tool calls, and the template does not read them."""

KWARGS_UNREAD = "kwargs-unread"
"""The row sets a variable that the template does not read; `Encoded.detail` names it."""

IDS_MADE = "ids-made"
"""The template takes only ids of calls that are nine letters and digits: others were made of the row's."""

REASONING_SPLIT = "reasoning-split"
"""Reasoning between tags in an answer's text was given to the template as reasoning."""

REASONING_JOINED = "reasoning-joined"
"""The template takes reasoning or text beside a call, not both: they were joined, reasoning first."""

CALLS_APART = "calls-apart"
"""The template takes one call a turn: calls of one turn follow each other, each before its result."""

TAGS_LEFT = "tags-left"
"""Tags of reasoning stay in an answer's text, though the template writes reasoning in another way."""

TEXT_MISSING = "text-missing"
"""A text of the prompt's side is not in the rendered row; `Encoded.detail` says which turn's."""

TOO_LARGE = "too-large"
"""The row holds more text than is ever rendered (`MAX_ROW_CHARACTERS`); there are no ids."""

NOT_TEXT = "not-text"
"""The row holds half a surrogate pair, which no tokenizer takes; there are no ids."""

MAX_ROW_CHARACTERS = 4 << 20
"""Rows with more text are never rendered: four million characters exceed every context there is."""

Message = dict[str, Any]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class LaidOut:
    """One row as text.

    Attributes:
        text: the rendered row; empty when there is none.
        spans: the supervised parts [start, end) in characters.
        problems: names from this module.
        detail: what the template said (REFUSED), or which turn is at fault (TEXT_MISSING, CONTENT_CHANGED).
        lost: answers that should be learnt and are not supervised.
        is_document: whether the template has no part in the text.
    """

    text: str
    spans: tuple[Span, ...] = ()
    problems: tuple[str, ...] = ()
    detail: str = ""
    lost: tuple[str, ...] = ()
    is_document: bool = False


def cleaned(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Return the messages with newlines as "\\n", without trailing white space and None values.

    The one place where contents are changed: training and serving both pass through it, and twice is as once.
    """
    return [
        {key: _clean(value) if key in CLEANED else value for key, value in message.items() if value is not None}
        for message in messages
    ]


CLEANED = ("content", REASONING)


def _clean(content: Any) -> Any:
    return content.replace("\r\n", "\n").replace("\r", "\n").rstrip() if isinstance(content, str) else content


def messages_of(record: Record) -> tuple[list[Message], list[int]]:
    """Return (cleaned messages up to the last answer to learn, indices of the answers to learn).

    What follows that answer can teach nothing.
    """
    messages, taught = cleaned(record.messages()), record.taught_places
    return (messages[: taught[-1] + 1] if taught else messages), taught


def document_of(record: Record, bos: str, eos: str) -> LaidOut:
    """Lay out a text without a conversation. All of it is supervised, and EOS ends it."""
    text = record.turns[0].content.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) > MAX_ROW_CHARACTERS:
        return LaidOut("", problems=(TOO_LARGE,))
    whole = f"{bos}{text}{eos}"
    return LaidOut(whole, ((len(bos), len(whole)),), is_document=True)


def answers_in(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the indices of assistant messages."""
    return [place for place, message in enumerate(messages) if message.get("role") == "assistant"]


def characters_in(messages: Iterable[Mapping[str, Any]]) -> int:
    """Return the number of characters in the messages."""
    return sum(len(content) for message in messages if isinstance(content := message.get("content"), str))


def token_mask(
    encoding: Encoding, text: str, spans: Iterable[Span], enders: frozenset[int]
) -> tuple[list[int], list[bool], bool, bool]:
    """Return (ids, mask, straddled, stopped) of one row, ids and mask of shape (tokens,).

    `straddled`: a token covers the edge of a span. `stopped`: every span ends with one of `enders`.
    """
    ids: list[int] = encoding.ids
    mask = [False] * len(ids)
    straddled, stopped = False, True
    for start, end in spans:
        first, begins_before = _first_from(encoding, start, len(text), len(ids))
        last, reaches_beyond = _first_from(encoding, end, len(text), len(ids))
        if reaches_beyond and ids[last - 1] not in enders:
            last -= 1
            straddled = True
        straddled |= begins_before
        if last > first:
            mask[first:last] = [True] * (last - first)
        stopped &= last > first and ids[last - 1] in enders
    return ids, mask, straddled, stopped


def _first_from(encoding: Encoding, place: int, characters: int, count: int) -> tuple[int, bool]:
    """Return (first token that begins at or after character `place`, whether the previous one covers `place`)."""
    if place >= characters:
        return count, False
    token = encoding.char_to_token(place)
    if token is None:
        return _searched(encoding.offsets, place), False
    if _start(encoding, token) >= place:
        return token, False
    while token < count and _start(encoding, token) < place:
        token += 1
    return token, True


def _start(encoding: Encoding, token: int) -> int:
    found: tuple[int, int] | None = encoding.token_to_chars(token)
    assert found is not None, "every token of a single text has a place in it"
    return found[0]


def _searched(offsets: Sequence[Span], place: int) -> int:
    # the tokenizer's normaliser removed the character at `place`, so no token covers it
    return next((token for token, (start, _) in enumerate(offsets) if start >= place), len(offsets))


CHUNK_ROWS = 1024
SOURCE = Path(__file__).with_name("fallback.jinja")


def _left_out(record: Record, messages: Sequence[Message]) -> tuple[str, ...]:
    """Return the parts of the row that the fallback template cannot show."""
    more = [message for message in messages if len(message) > 2]
    tools = bool(record.tools) or any(CALLS in message for message in more)
    reasoning = any(REASONING in message for message in more)
    unread = (KWARGS_UNREAD,) if record.template_kwargs else ()
    bare = any(CALLS in message and not message.get("content") for message in more)
    found = {TOOLS_IGNORED: tools, CONTENT_CHANGED: reasoning, ANSWER_EMPTY: bare}
    return (*(problem for problem, seen in found.items() if seen), *unread)


class FallbackLayout:
    """Lay rows out as fallback.jinja does, in plain Python. On a million rows Jinja would cost more than tokenising.

    Raises TemplateError for a tokenizer without an EOS token, which no answer could end with.
    """

    problems: tuple[str, ...] = ()

    def __init__(self, tokenizer: TextTokenizer) -> None:
        eos = tokenizer.eos_token
        if eos is None or tokenizer.eos_id is None:
            raise TemplateError(
                "the base's tokenizer has neither a chat template nor an EOS token, so no answer could end",
                fix="choose a base whose tokenizer_config.json names an eos_token",
            )
        self.eos = eos
        self.bos = tokenizer.bos_token or "" if tokenizer.adds_bos else ""
        self.stop_ids = (tokenizer.eos_id,)
        self.source = ("{{- bos_token -}}\n" if self.bos else "") + SOURCE.read_text(encoding="utf-8")

    def lay_out(self, records: Iterable[Record], use: Callable[[list[LaidOut]], None]) -> None:
        """Pass the text of every record to `use`, in order, chunk by chunk. Each answer and its EOS is supervised."""
        source = iter(records)
        while chunk := list(islice(source, CHUNK_ROWS)):
            use([self._laid(record) for record in chunk])

    def render(
        self, messages: Iterable[Mapping[str, Any]], add_generation_prompt: bool, tools: Iterable[Any] = ()
    ) -> str:
        """Return the text of `messages`. Tools cannot be shown."""
        return self._text(cleaned(messages), add_generation_prompt)[0]

    def with_calls_apart(self, record: Record) -> Record:
        """Return the record: calls are not shown."""
        return record

    def shows_turn_field(self, name: str) -> bool:
        """Return False: only roles and contents are shown."""
        return False

    def _laid(self, record: Record) -> LaidOut:
        if record.is_document:
            return document_of(record, self.bos, self.eos)
        messages, taught = messages_of(record)
        if characters_in(messages) > MAX_ROW_CHARACTERS:
            return LaidOut("", problems=(TOO_LARGE,))
        text, found = self._text(messages, False)
        if len(found) != len(taught):
            found = [span for place, span in zip(answers_in(messages), found, strict=True) if place in taught]
        return LaidOut(text, tuple(found), _left_out(record, messages))

    def _text(self, messages: list[dict[str, Any]], ask: bool) -> tuple[str, list[Span]]:
        parts, spans, length = [self.bos], [], len(self.bos)
        for place, message in enumerate(messages):
            role, content = message["role"], message.get("content", "")
            if role == "assistant":
                opening, body = "<|assistant|>\n", content + self.eos
                spans.append((length + len(opening), length + len(opening) + len(body)))
                part = opening + body + ("\n" if ask or place < len(messages) - 1 else "")
            else:
                part = f"<|{role}|>\n{content}<|end|>\n"
            parts.append(part)
            length += len(part)
        return "".join(parts) + ("<|assistant|>\n" if ask else ""), spans
