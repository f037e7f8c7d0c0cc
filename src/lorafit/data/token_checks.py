"""What can be said of a row once it is token ids and a loss mask, and of the special tokens in its text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from lorafit.data import template_problems as problems
from lorafit.data.excerpt import excerpt
from lorafit.data.judgements import Judgement, has_any
from lorafit.data.records import Record

if TYPE_CHECKING:
    from lorafit.data.tokenizer import TextTokenizer


class Tokenised(Protocol):
    """What is asked of an encoded row: ids and mask of (tokens,), and what its template says is wrong with it."""

    @property
    def ids(self) -> list[int]: ...

    @property
    def mask(self) -> list[bool]: ...

    @property
    def problems(self) -> tuple[str, ...]: ...

    @property
    def detail(self) -> str: ...


SAID: dict[str, Judgement] = {
    problems.STOP_MISSING: ("D022", "an answer is not followed by a supervised stop token"),
    problems.BOS_DOUBLED: ("D023", "the first two tokens are BOS"),
    problems.REFUSED: ("D024", "the template refuses the row"),
    problems.NOT_PREFIX_STABLE: ("D025", "only the last answer is supervised"),
    problems.PROMPT_DIFFERS: ("D026", "the rendered row does not begin with the prompt that serving sends"),
    problems.PROMPT_SPLIT: ("D028", "the tokenizer splits the prompt otherwise when an answer follows"),
    problems.CONTENT_CHANGED: ("D027", "the template dropped or rewrote part of an answer"),
    problems.STRADDLED: ("D028", "a token covers the edge of an answer"),
    problems.TOOLS_IGNORED: ("D029", "the template does not read tools"),
    problems.TOO_LARGE: ("D006", "more text than any context holds"),
    problems.NOT_TEXT: ("D043", "holds half a surrogate pair"),
}
"""The template's problems as judgements."""


def judged_tokens(row: Tokenised) -> Iterator[Judgement]:
    """Every judgement on one tokenised row; too-long rows are the caller's, who knows what to do with them."""
    for problem in row.problems:
        code, seen = SAID[problem]
        yield code, excerpt(row.detail, 120) or seen
    if not row.problems and True not in row.mask:
        yield "D021", "nothing in the row is supervised"


class SpecialTokens:
    """Finds the base's special tokens where they stand written out in a row's text."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        special = (tokenizer.added_tokens[number] for number in tokenizer.special_ids)
        texts = sorted({text for text in special if text.strip()}, key=lambda text: (-len(text), text))
        self.hints = _shared_starts(texts)
        self.pattern = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def judged(self, record: Record) -> Iterator[Judgement]:
        """A judgement when a turn or the system text holds one."""
        for text in (record.system or "", *(turn.content for turn in record.turns)):
            if has_any(text, self.hints) and (match := self.pattern.search(text)):
                yield "D045", f"'{match[0]}'"
                return


def _shared_starts(texts: Iterable[str]) -> tuple[str, ...]:
    # most bases have hundreds of special tokens that all start alike, and most texts none of those starts
    return tuple(sorted({text[:2] for text in texts}))
