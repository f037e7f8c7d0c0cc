"""token_ids: the ids of the tokens that the setting `trainable_tokens` names."""

from __future__ import annotations

from lorafit.config import RunConfig
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import UsageError


def token_ids(config: RunConfig, tokenizer: TextTokenizer | None = None) -> tuple[int, ...]:
    """Return the ids of `config.trainable_tokens`, each once. Raises UsageError for a text that is no token."""
    if not config.trainable_tokens:
        return ()
    tokenizer = tokenizer or TextTokenizer.from_base(config.base, config.revision)
    found = []
    for text in config.trainable_tokens:
        ids = tokenizer.encode(text)
        if len(ids) != 1:
            what = f"'{text:.40}' is no token of the base: its tokenizer makes {len(ids)} tokens of it"
            raise UsageError(what, where="trainable_tokens", fix="name tokens that the base's tokenizer has")
        found.append(ids[0])
    return tuple(dict.fromkeys(found))
