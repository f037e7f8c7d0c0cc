"""ShownRow: a row as the model will be taught it, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.data.store import Rows

if TYPE_CHECKING:
    from lorafit.data.prepare import Prepared
    from lorafit.data.template.template import Template

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
    """Where the row stands and its tokens."""

    source: str
    tokens: tuple[ShownToken, ...]


def show_rows(prepared: Prepared, template: Template, count: int) -> list[ShownRow]:
    """The first `count` training rows (then held-out ones), each token with what the loss does with it."""
    shown: list[ShownRow] = []
    for rows in (prepared.train, prepared.holdout):
        for position in range(min(len(rows), count - len(shown))):
            shown.append(_shown(rows, position, template))
    return shown


def _shown(rows: Rows, position: int, template: Template) -> ShownRow:
    ids, mask = rows.ids(position).tolist(), rows.mask(position).tolist()
    texts = _texts(template, ids)
    tokens = tuple(
        ShownToken(text, supervised, token in template.stop_ids)
        for text, token, supervised in zip(texts, ids, mask, strict=True)
    )
    return ShownRow(rows.source(position), tokens)


def _texts(template: Template, ids: list[int]) -> list[str]:
    """The text that each of `ids` adds. The last token of a character has all of it, those before have none."""

    def decoded(start: int, end: int) -> str:
        return template.tokenizer.decode(ids[start:end], skip_special_tokens=False)

    # decoded beside the tokens before, so that a word keeps its space
    texts, before, begun = [], 0, 0
    for end in range(1, len(ids) + 1):
        known, text = decoded(before, begun), decoded(before, end)
        is_whole = not text.endswith(HALF) or end - begun >= MOST_TOKENS or end == len(ids)
        texts.append(text[len(known) :] if is_whole else "")
        if is_whole:
            before, begun = begun, end
    return texts
