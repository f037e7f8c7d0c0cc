"""TextTokenizer: text to ids exactly as transformers' AutoTokenizer does it, without torch or transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from tokenizers import Encoding, Tokenizer, models

from lorafit.config import base_folder, one_line
from lorafit.data.tokenizer.conversion import BACKEND_FILE, cache_home, converted, facts_of
from lorafit.data.tokenizer.files import TokenizerFiles
from lorafit.data.tokenizer.trial import require_bounded
from lorafit.errors import BackboneError

# WordPiece-style detokenisation, as transformers' `clean_up_tokenization`
ENDINGS = (".", "?", "!", ",")
CLITICS = ("n't", "'m", "'s", "'ve", "'re")
CLEAN_UPS = (*((f" {mark}", mark) for mark in ENDINGS), (" ' ", "'"), *((f" {clitic}", clitic) for clitic in CLITICS))


class TextTokenizer:
    """A base model's tokenizer. Safe to pickle to worker processes and to call from threads.

    `named` maps `bos_token`, `eos_token`, … to their text; `files` are the base's tokenizer files, as exports
    copy them; `chat_template` is the base's default Jinja chat template, or None.
    """

    def __init__(
        self,
        backend: Tokenizer,
        named: Mapping[str, str],
        *,
        chat_template: str | None = None,
        files: Sequence[Path] = (),
        cleans_up: bool = False,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.named = dict(named)
        self.chat_template = chat_template
        self.files = tuple(files)
        self._cleans_up = cleans_up
        self._frame = _frame_of(backend)
        # Without its post-processor the backend gives the same ids, and offsets that are not trimmed: a token
        # that begins with a blank of the prompt must not look as if it began with the response.
        backend.post_processor = None
        self._backend = backend

    @classmethod
    def from_base(cls, base: str, revision: str | None = None) -> TextTokenizer:
        """Return the tokenizer of `base`, a local folder or a hub id. Raises BackboneError if there is none."""
        return cls.from_folder(base_folder(base, revision))

    @classmethod
    def from_folder(cls, path: str | Path) -> TextTokenizer:
        """Return the tokenizer in the folder `path`. Raises BackboneError if it is missing or broken."""
        files = TokenizerFiles.read(Path(path))
        if files.is_empty:
            raise BackboneError(
                "no tokenizer there", where=str(path), fix="choose a base that holds tokenizer.json or tokenizer.model"
            )
        return _plain(files) or _converted(files)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`. `add_special_tokens` adds BOS and EOS by the tokenizer's own rule."""
        with _panics_are_errors():
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._frame[0], *ids, *self._frame[1]] if add_special_tokens else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of every text, in parallel, without special tokens."""
        with _panics_are_errors():
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """Return whole encodings: `.ids`, `.offsets` in characters of the text, `.char_to_token(i)`."""
        with _panics_are_errors():
            return list(self._backend.encode_batch(list(texts), add_special_tokens=False))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        with _panics_are_errors():
            text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if self._cleans_up:
            for old, new in CLEAN_UPS:
                text = text.replace(old, new)
        return text

    def id_of(self, token: str | None) -> int | None:
        """Return the id of one token, or None if the vocabulary lacks it."""
        found: int | None = None if token is None else self._backend.token_to_id(token)
        return found

    def token_of(self, token_id: int) -> str | None:
        """Return the text of one token as the vocabulary spells it."""
        found: str | None = self._backend.id_to_token(token_id)
        return found

    @property
    def bos_token(self) -> str | None:
        """The token that begins a text."""
        return self.named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """The token that ends a text."""
        return self.named.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        """The padding token; many bases have none."""
        return self.named.get("pad_token")

    @property
    def bos_id(self) -> int | None:
        """Id of `bos_token`."""
        return self.id_of(self.bos_token)

    @property
    def eos_id(self) -> int | None:
        """Id of `eos_token`."""
        return self.id_of(self.eos_token)

    @property
    def adds_bos(self) -> bool:
        """True if `encode(..., add_special_tokens=True)` puts BOS in front."""
        return self.bos_id is not None and self.bos_id in self._frame[0][:1]

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Added tokens by id. They are matched whole before any other splitting."""
        return {int(key): token.content for key, token in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that `decode` leaves out when it skips special tokens."""
        decoder = self._backend.get_added_tokens_decoder()
        return frozenset(int(key) for key, token in decoder.items() if token.special)

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything that decides the ids of a text; the same for a copy of the folder."""
        definition = json.dumps([self._backend.to_str(), self._frame, self._backend.encode_special_tokens, self.named])
        return hashlib.sha256(definition.encode()).hexdigest()

    @cached_property
    def vocabulary_hash(self) -> str:
        """SHA-256 of every token with its id, and of the merges; the same in every release of tokenizers."""
        merges = json.loads(self._backend.to_str())["model"].get("merges") or ()
        pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        content = json.dumps([sorted(self._backend.get_vocab(with_added_tokens=True).items()), pairs])
        return hashlib.sha256(content.encode()).hexdigest()


def _plain(files: TokenizerFiles) -> TextTokenizer | None:
    """Return the tokenizer of tokenizer.json, or None if transformers would change it on loading."""
    path = files.folder / BACKEND_FILE
    if not path.is_file() or not files.is_plain:
        return None
    backend = _loaded(path)
    if not files.is_whole_in(backend):
        return None
    padding = {"pad_token": backend.padding["pad_token"]} if backend.padding else {}
    cleans_up = bool(files.config.get("clean_up_tokenization_spaces")) and not isinstance(backend.model, models.BPE)
    named = {**padding, **files.named_tokens()}
    return TextTokenizer(backend, named, chat_template=files.chat_template(), files=files.paths, cleans_up=cleans_up)


def _converted(files: TokenizerFiles) -> TextTokenizer:
    """Return the tokenizer as transformers builds it from the files."""
    home = converted(files)
    named, cleans_up, splits_special = facts_of(home)
    backend = _loaded(home / BACKEND_FILE)
    backend.encode_special_tokens = splits_special
    return TextTokenizer(backend, named, chat_template=files.chat_template(), files=files.paths, cleans_up=cleans_up)


def _loaded(path: Path) -> Tokenizer:
    require_bounded(path, cache_home())
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise BackboneError(
            f"the tokenizer cannot be loaded ({one_line(error)})", where=str(path), fix="download the base again"
        ) from error


@contextmanager
def _panics_are_errors() -> Iterator[None]:
    """Turn a panic of the tokenizer's Rust code, which is not an Exception, into a BackboneError.

    The trial finds most patterns that panic; a row can hold the text that it did not think of.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise BackboneError(
            f"the tokenizer breaks on a text of the data ({one_line(error)})",
            where="the base's tokenizer.json",
            fix="do not trust this base's tokenizer, or choose another base",
        ) from error


def _frame_of(backend: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text."""
    for probe in ("a", "0", "."):
        bare = backend.encode(probe, add_special_tokens=False).ids
        framed = backend.encode(probe, add_special_tokens=True).ids
        starts = range(len(framed) - len(bare) + 1) if bare else ()
        for start in starts:
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
    return [], []
