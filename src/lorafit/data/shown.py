"""ShownRow: one row token by token, as training sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.data.store import Rows

if TYPE_CHECKING:
    from lorafit.data.prepare import Prepared
    from lorafit.data.template.template import Template
    from lorafit.data.tokenizer.tokenizer import TextTokenizer


BROKEN = "\ufffd"
MOST_TOKENS = 8
"""A character is four bytes at most; a run of replacement characters that the row itself holds must end somewhere."""

HALF = "\ufffd"
"""What a part of a character decodes to."""
MOST_TOKENS = 8
"""No character takes more tokens: a longer one is in the text itself."""


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token's text, whether the loss is taken on it, and whether it is the stop token."""

    text: str
    supervised: bool
    is_stop: bool


@dataclass(frozen=True, slots=True)
class ShownRow:
    """The place of a row, and its tokens."""

    source: str
    tokens: tuple[ShownToken, ...]


def show_rows(prepared: Prepared, template: Template, count: int) -> list[ShownRow]:
    """Return the first `count` training rows (then held-out ones), each token with its supervision."""
    shown: list[ShownRow] = []
    for rows in (prepared.train, prepared.holdout):
        for position in range(min(len(rows), count - len(shown))):
            shown.append(_shown(rows, position, template))
    return shown


def _shown(rows: Rows, position: int, template: Template) -> ShownRow:
    ids, mask = rows.ids(position).tolist(), rows.mask(position).tolist()
    texts = token_texts(ids, mask, template.tokenizer)
    tokens = (
        ShownToken(text, supervised, token in template.stop_ids)
        for text, token, supervised in zip(texts, ids, mask, strict=True)
    )
    return ShownRow(rows.source(position), tuple(tokens))


def token_texts(ids: Sequence[int], mask: Sequence[bool], tokenizer: TextTokenizer) -> list[str]:
    """Return the text of each token. A character of several tokens belongs to the last of them; the others are empty.

    Each text is what the token adds to the one before it, because decoders drop the blank that begins a text.
    """
    texts: list[str] = []
    first = 0  # of the tokens whose character is not whole yet
    for place, supervised in enumerate(mask):
        before = list(ids[max(0, first - 1) : first])
        known = tokenizer.decode(before, skip_special_tokens=False)
        whole = tokenizer.decode([*before, *ids[first : place + 1]], skip_special_tokens=False)
        text = whole.removeprefix(known)
        resumes = place + 1 < len(ids) and mask[place + 1] == supervised and place - first < MOST_TOKENS
        if text.endswith(BROKEN) and resumes:
            texts.append("")
            continue
        texts.append(text)
        first = place + 1
    return texts
