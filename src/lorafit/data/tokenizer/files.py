"""TokenizerFiles: the tokenizer files of a base folder, and whether tokenizer.json alone is complete."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorafit.config import read_json
from lorafit.errors import BackboneError, TemplateError

CONFIG, SPECIAL_MAP, ADDED, BACKEND = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
VOCABULARY_PATTERNS = ("*.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.tiktoken")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_FILE_BYTES = 256 << 20

GENERIC_CLASSES = {"PreTrainedTokenizerFast", "TokenizersBackend"}
# transformers swaps the declared class of these for one that rebuilds the pipeline from vocabulary and merges
REBUILT_MODEL_TYPES = ("qwen", "hyperclovax", "siglip", "mistral", "ministral", "mixtral", "pixtral", "voxtral")
# settings of tokenizer_config.json that a plain folder may hold: none changes how text becomes ids
PLAIN_SETTINGS = {
    *NAMED_TOKENS,
    *("tokenizer_class", "backend", "chat_template", "clean_up_tokenization_spaces", "model_input_names"),
    *("model_max_length", "padding_side", "name_or_path", "is_local", "local_files_only"),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder's tokenizer files, read once. `config` is tokenizer_config.json, `model` is config.json."""

    folder: Path
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    special_map: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> TokenizerFiles:
        """Return the tokenizer files of `folder`. Raises BackboneError if one is not valid JSON."""
        return cls(folder, *(_json(folder / name) for name in (CONFIG, "config.json", SPECIAL_MAP)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """Return every tokenizer file, chat template included, sorted by name: the files that an export copies."""
        names = [self.folder / name for name in (BACKEND, CONFIG, SPECIAL_MAP, ADDED, *TEMPLATE_FILES)]
        found = {path for path in names if path.is_file()} | set(self._vocabularies())
        return tuple(sorted(found))

    @property
    def is_empty(self) -> bool:
        """True if no file here defines a vocabulary."""
        return not (self.folder / BACKEND).is_file() and not any(self._vocabularies())

    def chat_template(self) -> str | None:
        """Return the default chat template. A .jinja file goes before tokenizer_config.json, as in transformers."""
        standalone = self.folder / TEMPLATE_FILES[0]
        if standalone.is_file():
            return _text(standalone)
        found = self.config.get("chat_template")
        if found is None:
            found = _json(self.folder / TEMPLATE_FILES[1]).get("chat_template")
        return _default_template(found, self.folder)

    def named_tokens(self) -> dict[str, str]:
        """Return `bos_token`, `eos_token` and the like of a plain folder (see `is_whole_in`)."""
        return {key: str(self.config[key]) for key in NAMED_TOKENS if self.config.get(key) is not None}

    @property
    def is_plain(self) -> bool:
        """True if neither the class nor a setting changes the tokenizer of tokenizer.json."""
        kind = self.config.get("tokenizer_class") or self.model.get("tokenizer_class")
        is_generic = kind in GENERIC_CLASSES and not str(self.model.get("model_type")).startswith(REBUILT_MODEL_TYPES)
        says_more = self.config.keys() - PLAIN_SETTINGS or self.special_map or (self.folder / ADDED).is_file()
        return is_generic and not says_more

    def is_whole_in(self, backend: Tokenizer) -> bool:
        """Return True if `backend`, the loaded tokenizer.json, is all that the folder says about the tokenizer.

        Every other folder is transformers' to read: a class may rebuild the pipeline, a setting change a token.
        """
        if not self.is_plain:
            return False
        # transformers makes every named token a special one
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        padding = backend.padding["pad_token"] if backend.padding else None
        return all(token is None or token in special for token in (*map(self.config.get, NAMED_TOKENS), padding))

    def digest(self) -> str:
        """Return a hash of everything that transformers reads to build the tokenizer, without the chat template."""
        kept = {key: value for key, value in self.config.items() if key not in ("chat_template", "name_or_path")}
        model = {key: self.model.get(key) for key in ("model_type", "tokenizer_class", "transformers_version")}
        digest = hashlib.sha256(json.dumps([kept, model, self.special_map], sort_keys=True).encode())
        for path in [self.folder / BACKEND, self.folder / ADDED, *sorted(self._vocabularies())]:
            if path.is_file():
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def _vocabularies(self) -> Iterator[Path]:
        for pattern in VOCABULARY_PATTERNS:
            yield from (path for path in self.folder.glob(pattern) if path.is_file())


def _default_template(found: Any, folder: Path) -> str | None:
    if isinstance(found, list):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
    if not found or isinstance(found, str):
        return found or None
    if not isinstance(found, dict):
        raise TemplateError("chat_template is no text", where=str(folder), fix="mend it in tokenizer_config.json")
    if not isinstance(found.get("default"), str):
        names = ", ".join(sorted(map(str, found)))
        raise TemplateError(
            f"the tokenizer names chat templates ({names}) but no default",
            where=str(folder),
            fix="keep the one to train with, as chat_template.jinja",
        )
    return str(found["default"])


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BackboneError("the file is too large for a tokenizer's", where=str(path), fix="check the base folder")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BackboneError(f"cannot be read ({error.strerror})", where=str(path), fix="check the file") from error
    except UnicodeDecodeError as error:
        raise BackboneError("is not UTF-8", where=str(path), fix="download the base again") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json(path, BackboneError, max_bytes=MAX_FILE_BYTES, fix="download the base again")
