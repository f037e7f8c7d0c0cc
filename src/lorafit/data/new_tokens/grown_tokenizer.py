"""grown_tokenizer: a base's tokenizer files with further tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lorafit.config import read_json
from lorafit.data.tokenizer.files import ADDED, BACKEND, CONFIG, MAX_FILE_BYTES
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import BackboneError, UsageError

WHERE = "new_tokens"
MAX_TOKENS, MAX_CHARACTERS = 10_000, 200
PROBE = "A text with numbers 1234, Ünïcödé, code {x: [1]} and\n\n  blanks."
"""Text whose ids must stay as they are."""


def require_new(texts: Sequence[str], tokenizer: TextTokenizer) -> None:
    """Raise UsageError for texts that cannot become tokens: known ones, blank ones, and too many."""
    fix = "name each new token once, without blanks around it"
    if len(texts) > MAX_TOKENS:
        raise UsageError(f"{len(texts):,} tokens are new, and {MAX_TOKENS:,} are the most", where=WHERE, fix=fix)
    for text in texts:
        if text != text.strip() or not text or len(text) > MAX_CHARACTERS:
            raise UsageError(f"'{text:.40}' cannot become a token", where=WHERE, fix=fix)
        if len(tokenizer.encode(text)) == 1:
            what = f"'{text:.40}' is a token of the base already"
            raise UsageError(what, where=WHERE, fix="name it in trainable_tokens to train its row")


def grow_tokenizer(folder: Path, texts: Sequence[str], before: TextTokenizer) -> dict[str, int]:
    """Add `texts` as ordinary tokens to the tokenizer files in `folder`, a copy of the base's. Return text -> id.

    They are found before the text is split, as they are written, and stay in decoded text. Raises BackboneError for a
    base without tokenizer.json, and where the tokenizer's class does not keep them.
    """
    path = folder / BACKEND
    if not path.is_file():
        what = "the base has no tokenizer.json, which new tokens are added to"
        raise BackboneError(what, where=WHERE, fix="save AutoTokenizer.from_pretrained(BASE) into a copy of the base")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    ids: dict[str, int] = {text: place for text in texts if (place := tokenizer.token_to_id(text)) is not None}
    tokenizer.save(str(path))
    _list_in(folder / CONFIG, "added_tokens_decoder", {str(place): _described(text) for text, place in ids.items()})
    _list_in(folder / ADDED, None, ids)
    after = TextTokenizer.from_folder(folder)
    kept = len(ids) == len(texts) and all(after.encode(text) == [place] for text, place in ids.items())
    if not kept or after.encode(PROBE) != before.encode(PROBE):
        what = "the base's tokenizer class does not take further tokens"
        raise BackboneError(what, where=WHERE, fix="leave new_tokens out")
    return ids


def _described(text: str) -> dict[str, Any]:
    plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    return {"content": text, **plain}


def _list_in(path: Path, key: str | None, tokens: Mapping[str, Any]) -> None:
    """Add `tokens` to the JSON file at `path`, below `key`, where the file has such a list."""
    if not path.is_file():
        return
    content = read_json(path, BackboneError, max_bytes=MAX_FILE_BYTES, fix="download the base again")
    listed = content if key is None else content.get(key)
    if not isinstance(listed, dict):
        return
    listed.update(tokens)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
