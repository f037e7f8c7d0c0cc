"""The tokenizer files of a base folder: which there are, what they say, and whether tokenizer.json says it all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

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
# settings of tokenizer_config.json that say nothing about how text becomes ids
PASSIVE_KEYS = {
    *NAMED_TOKENS,
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "backend",
    "chat_template",
    "clean_up_tokenization_spaces",
    "errors",
    "is_local",
    "legacy",
    "local_files_only",
    "max_length",
    "model_input_names",
    "model_max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding_side",
    "processor_class",
    "special_tokens_map_file",
    "stride",
    "tokenizer_class",
    "truncation_side",
    "truncation_strategy",
    "use_fast",
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
        """What `folder` holds. Raises BackboneError when a file there is not the JSON it should be."""
        return cls(folder, *(_json(folder / name) for name in (CONFIG, "config.json", SPECIAL_MAP)))

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every tokenizer file, chat template included, sorted by name: what an export copies."""
        names = [self.folder / name for name in (BACKEND, CONFIG, SPECIAL_MAP, ADDED, *TEMPLATE_FILES)]
        found = {path for path in names if path.is_file()} | set(self._vocabularies())
        return tuple(sorted(found))

    @property
    def is_empty(self) -> bool:
        """True when no file here defines a vocabulary."""
        return not (self.folder / BACKEND).is_file() and not any(self._vocabularies())

    def chat_template(self) -> str | None:
        """The default chat template. A .jinja file goes before tokenizer_config.json, as in transformers."""
        standalone = self.folder / TEMPLATE_FILES[0]
        if standalone.is_file():
            return _text(standalone)
        found = self.config.get("chat_template")
        if found is None:
            found = _json(self.folder / TEMPLATE_FILES[1]).get("chat_template")
        return _default_template(found, self.folder)

    def named_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and the like, as text."""
        # special_tokens_map.json is the older file: transformers reads it only without added_tokens_decoder
        older = {} if "added_tokens_decoder" in self.config else self.special_map
        named = {key: older.get(key, self.config.get(key)) for key in NAMED_TOKENS}
        return {key: _token_text(value) for key, value in named.items() if value is not None}

    def is_whole_in(self, backend: Tokenizer) -> bool:
        """True when transformers would use `backend` (the loaded tokenizer.json) just as it stands.

        It would not when the declared class rebuilds the pipeline, or when the other files name tokens
        that tokenizer.json lacks or flags otherwise.
        """
        if not self._has_generic_class() or self._active_settings() or (self.folder / ADDED).is_file():
            return False
        try:
            return self._names_nothing_new(backend)
        except (TypeError, AttributeError, KeyError):
            return False  # settings that make no sense: transformers says which

    def _names_nothing_new(self, backend: Tokenizer) -> bool:
        present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        if not all(_same(token, present.get(_token_text(token))) for token in self._declared_tokens()):
            return False
        # transformers makes every named token a special one
        padding = [backend.padding["pad_token"]] if backend.padding else []
        named = [_token_text(token) for token in [*self._special_tokens(), *padding]]
        return all(token in present and present[token].special for token in named)

    def digest(self) -> str:
        """A hash of everything that transformers reads to build the tokenizer; the chat template is not part of it."""
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

    def _active_settings(self) -> set[str]:
        return {key for key in self.config if key not in PASSIVE_KEYS and self.config[key] not in (None, False)}

    def _has_generic_class(self) -> bool:
        kind = self.config.get("tokenizer_class") or self.model.get("tokenizer_class")
        model_type = str(self.model.get("model_type") or "")
        return kind in GENERIC_CLASSES and not model_type.startswith(REBUILT_MODEL_TYPES)

    def _declared_tokens(self) -> Iterator[Any]:
        yield from self.config.get("added_tokens_decoder", {}).values()
        yield from self._special_tokens()

    def _special_tokens(self) -> Iterator[Any]:
        for source in (self.config, self.special_map):
            yield from (source[key] for key in NAMED_TOKENS if source.get(key) is not None)
            for key in ("additional_special_tokens", "extra_special_tokens"):
                extra = source.get(key) or []
                yield from extra.values() if isinstance(extra, dict) else extra


def _same(declared: Any, present: AddedToken | None) -> bool:
    if present is None or not isinstance(declared, dict):
        return present is not None
    wanted = AddedToken(**{"special": True, **{key: value for key, value in declared.items() if key != "__type"}})
    return _flags_of(wanted) == _flags_of(present)


def _flags_of(token: AddedToken) -> tuple[bool, ...]:
    return (token.special, token.lstrip, token.rstrip, token.single_word, token.normalized)


def _token_text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


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
