"""generation: a base's generation settings, and the tokens at which an answer ends. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lorafit.config.foreign_text import read_json
from lorafit.errors import BackboneError

GENERATION_FILE = "generation_config.json"
MAX_BYTES = 64 << 20
INHERITED = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
"""Generation settings that older models keep in config.json."""
PLAIN = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
"""The defaults of transformers for the settings that choose the next token."""
TOKENS = ("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id")
MOST_TOKENS = 1 << 31
"""Token ids are below; torch reads no larger ones beside its 32-bit indices."""


def generation_settings(base: Path) -> dict[str, Any]:
    """Return the generation settings of the model in the folder `base`, as transformers reads them.

    Without a generation_config.json they come from config.json. Raises BackboneError for a damaged file, and for a
    value that would stop an answer, or end none.
    """
    path = base / GENERATION_FILE
    if not path.is_file():
        return _inherited(base)
    found = _read(path)
    problem = next(_problems(found), None)
    if problem is not None:
        raise BackboneError(problem, where=str(path), fix="correct it, or remove it from the file")
    return found


def served_stop_ids(trained: Iterable[int], base: Path) -> tuple[int, ...]:
    """Return every token id that ends an answer: the `trained` ones first, then the base's own."""
    listed = generation_settings(base).get("eos_token_id", _inherited(base).get("eos_token_id"))
    own = listed if isinstance(listed, list) else [listed]
    return tuple(dict.fromkeys([*trained, *(each for each in own if type(each) is int and each >= 0)]))


def sampling_settings(base: Path) -> dict[str, Any]:
    """Return the settings of the base that choose the next token and are not transformers' defaults.

    Greedy decoding has no sampling, so settings of sampling count only beside `do_sample`.
    """
    found = generation_settings(base)
    samples = bool(found.get("do_sample"))
    return {
        key: found[key]
        for key, usual in PLAIN.items()
        if found.get(key) not in (None, usual) and (samples or key == "repetition_penalty")
    }


def _problems(settings: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence for each value that transformers would fail on, or read as something else."""
    for key in TOKENS:
        if not _is_token(settings.get(key), may_be_list=key == "eos_token_id"):
            yield f"{key} is {settings[key]!r:.40}, and no token's id"
    for key in ("temperature", "top_p", "repetition_penalty"):
        value = settings.get(key)
        if value is not None and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
            yield f"{key} is {value!r:.40}, and no number from 0"
    if settings.get("repetition_penalty") == 0:
        yield "repetition_penalty is 0, by which scores are divided"


def _is_token(value: Any, *, may_be_list: bool) -> bool:
    """Return True for None, a token id, -1 for no token, and with `may_be_list` for a list of ids."""
    if may_be_list and isinstance(value, list):
        return all(type(one) is int and -1 <= one < MOST_TOKENS for one in value)
    return value is None or (type(value) is int and -1 <= value < MOST_TOKENS)


def _inherited(base: Path) -> dict[str, Any]:
    """Return the generation settings in config.json."""
    config = _read(base / "config.json")
    text = config.get("text_config")
    text = text if isinstance(text, dict) else {}
    found = {key: config.get(key, text.get(key)) for key in INHERITED}
    return {key: value for key, value in found.items() if value is not None}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(path, BackboneError, max_bytes=MAX_BYTES, fix="repair or remove the file")
