"""GrownBase: a base with new tokens, as a folder that every command takes for a base.

The folder is made from the base and the tokens alone, and is kept in the user's cache. Tokenizer and configuration
come first; the weights are added when a run needs them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.config import base_folder, one_line, read_json
from lorafit.config.base_files import TEXT_PATTERNS
from lorafit.data.cache import default_folder
from lorafit.data.new_tokens.grown_tokenizer import grow_tokenizer, require_new
from lorafit.data.new_tokens.grown_weights import INDEX, Growth, grown_config, vocabulary_of, write_grown
from lorafit.data.sealed_folder import measured_all, staged
from lorafit.data.tokenizer.files import TokenizerFiles
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import BackboneError
from lorafit.runs.seal import changed_file, file_hashes, is_sealed, sealed

FORMAT = 1
GROWN, WEIGHTS = "new_tokens.json", "new_rows.json"
"""Files of a grown base: what it was made of, and the hashes of the weights that were written."""
COPIED = (*TEXT_PATTERNS, "*.tiktoken", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class GrownBase:
    """Hold the folder of a base with new tokens.

    Attributes:
        folder: the folder, with tokenizer and configuration.
        origin: the folder of the base.
        base: the base's name, a path or a hub id.
        revision: the base's revision on the hub.
        rows: rows of the base's embedding.
        tokens: text -> id of each new token.
    """

    folder: Path
    origin: Path
    base: str
    revision: str | None
    rows: int
    tokens: Mapping[str, int]

    @classmethod
    def of(cls, base: str, revision: str | None, texts: Sequence[str]) -> GrownBase:
        """Return the grown base of `base`, made unless it is kept already. A grown base with `texts` is itself.

        Raises UsageError for texts that cannot become tokens, BackboneError for a base that cannot take them.
        """
        origin = base_folder(base, revision)
        known = cls.read(origin)
        if known is not None and set(texts) <= set(known.tokens):
            return known
        name = Path(base.rstrip("/")).name
        place = default_folder().parent / "bases" / f"{name}+{len(texts)}-{_digest(base, origin, texts)[:12]}"
        found = cls.read(place)
        if found is not None:
            return found
        with _kept(place.parent), staged(place.parent, place.name) as fresh:
            _make(fresh, origin, {"base": base, "revision": revision}, texts)
            shutil.rmtree(place, ignore_errors=True)  # one whose files have changed
            try:
                fresh.rename(place)
            except OSError:
                if cls.read(place) is None:  # nobody else has made it meanwhile
                    raise
        made = cls.read(place)
        if made is None:
            raise BackboneError("the grown base was changed at once", where=str(place), fix="run the command again")
        return made

    @classmethod
    def read(cls, folder: Path) -> GrownBase | None:
        """Return the grown base in `folder`; None for another folder, and for one whose files have changed."""
        path = folder / GROWN
        if not path.is_file():
            return None
        try:
            facts = read_json(path, BackboneError)
            if not is_sealed(facts) or facts["format"] != FORMAT or changed_file(folder, facts["files"]):
                return None
            made = (Path(facts["origin"]), facts["base"], facts["revision"], facts["rows"], facts["tokens"])
            return cls(folder, *made)
        except (BackboneError, KeyError, TypeError):
            return None

    @property
    def has_weights(self) -> bool:
        """Return True if the weights are there as they were written."""
        try:
            facts = read_json(self.folder / WEIGHTS, BackboneError)
            if not is_sealed(facts) or not all((self.folder / name).exists() for name in facts["linked"]):
                return False
            return bool(measured_all([self.folder / name for name in facts["written"]]) == facts["written"])
        except (BackboneError, OSError, KeyError, TypeError):
            return False

    def add_weights(self) -> None:
        """Write the weights. Raises BackboneError."""
        origin = base_folder(self.base, self.revision, weights=True)
        growth = Growth(self.rows, tuple(sorted(self.tokens.values())))
        with _kept(self.folder):
            written = write_grown(origin, self.folder, growth)
            everything = [path for path in self.folder.glob("*.safetensors*") if not path.name.startswith(".")]
            linked = sorted(path.name for path in everything if path not in written)
            facts = {"linked": linked, "written": measured_all(written)}
            part = self.folder / f".{WEIGHTS}.{os.getpid()}"
            part.write_text(json.dumps(sealed(facts)), encoding="utf-8")
            part.replace(self.folder / WEIGHTS)


@contextmanager
def _kept(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"the base with its new tokens cannot be kept ({one_line(error.strerror or error)})"
        raise BackboneError(what, where=str(place), fix="make room, or set LORAFIT_CACHE") from error


def _make(folder: Path, origin: Path, facts: Mapping[str, Any], texts: Sequence[str]) -> None:
    before = TextTokenizer.from_folder(origin)
    require_new(texts, before)
    config = read_json(origin / "config.json", BackboneError)
    rows = vocabulary_of(config)
    folder.mkdir()
    for pattern in COPIED:
        for path in origin.glob(pattern):
            if path.is_file() and path.name not in (INDEX, GROWN, WEIGHTS):
                shutil.copyfile(path, folder / path.name)
    tokens = grow_tokenizer(folder, texts, before)
    growth = Growth(rows, tuple(sorted(tokens.values())))
    text = json.dumps(grown_config(config, growth), indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    files = file_hashes(sorted(folder.iterdir()))
    made = {"format": FORMAT, **facts, "origin": str(origin.absolute()), "rows": rows, "tokens": tokens, "files": files}
    (folder / GROWN).write_text(json.dumps(sealed(made), indent=2) + "\n", encoding="utf-8")


def _digest(base: str, origin: Path, texts: Sequence[str]) -> str:
    """Return a hash of what the grown base is made of; of weights in a local folder the sizes and dates."""
    listed: list[list[Any]] = []
    if Path(base).expanduser().is_dir():  # a snapshot's path names its commit
        found = ((path.name, path.stat()) for path in origin.iterdir() if path.is_file())
        listed = sorted([name, stat.st_size, stat.st_mtime_ns] for name, stat in found)
    kept = [FORMAT, str(origin.resolve()), TokenizerFiles.read(origin).digest(), listed, list(texts)]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()
