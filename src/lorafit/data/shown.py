"""ShownRow: a row as the model will be taught it, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.data.store import Rows

if TYPE_CHECKING:
    from lorafit.data.prepare import Prepared
    from lorafit.data.template.template import Template


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
    tokens = tuple(
        ShownToken(
            template.tokenizer.decode([token], skip_special_tokens=False), supervised, token in template.stop_ids
        )
        for token, supervised in zip(rows.ids(position).tolist(), rows.mask(position).tolist(), strict=True)
    )
    return ShownRow(rows.source(position), tokens)
