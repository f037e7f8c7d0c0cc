"""Special tokens whose embedding rows were never trained, found in the safetensors without torch.

A base model often carries the chat tokens of its instruct sibling with rows that no gradient ever touched.
LoRA on attention cannot repair those: the prompt then holds vectors that mean nothing to the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.config.stored_tensors import FLOATS, read_header, widened
from lorafit.data.checks.findings import CODES, EXAMPLES
from lorafit.data.schema.records import Record, Turn
from lorafit.data.sources.raw_row import excerpt
from lorafit.data.store import SUPERVISED, Rows, Stored
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.findings import Finding, Severity

EMBEDDING_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
SAMPLE = 2048
MAX_TWINS = 4096
# shares of what is usual among trained rows below which a row was never trained
MIN_NORM, MIN_DISTANCE, TWIN_DISTANCE = 0.05, 0.25, 0.01


@dataclass(frozen=True)
class EmbeddingTable:
    """The input embeddings on disk: `raw` (tokens, hidden), memory-mapped, stored as `dtype`."""

    raw: NDArray[Any]
    dtype: str

    @classmethod
    def find(cls, folder: Path) -> EmbeddingTable | None:
        """Return the table among the safetensors in `folder`, or None. Raises BackboneError when one is damaged."""
        for path in sorted(folder.glob("*.safetensors")):
            header, start = read_header(path)
            for name, entry in header.items():
                if name.endswith(EMBEDDING_NAMES) and entry.get("dtype") in FLOATS and len(entry["shape"]) == 2:
                    begin = start + int(entry["data_offsets"][0])
                    raw = np.memmap(path, FLOATS[entry["dtype"]], "r", offset=begin, shape=tuple(entry["shape"]))
                    return cls(raw, entry["dtype"])
        return None

    def rows(self, ids: Iterable[int]) -> NDArray[np.float32]:
        """Return the rows of `ids` as float32 (ids, hidden)."""
        return widened(np.asarray(self.raw[list(ids)]), self.dtype)


def untrained_special_tokens(
    tokenizer: TextTokenizer, folder: Path, template: Template | None = None
) -> tuple[str, ...]:
    """Special tokens whose embeddings in `folder` were never trained, by id.

    With `template`, only those that its prompts and answers hold; without, all. Empty when `folder` has no
    safetensors with input embeddings. Raises BackboneError when a safetensors file is damaged.

    A row counts as never trained when it is about zero, about the mean of all rows (how added rows are
    initialised), about equal to another special token's (trained rows never coincide), or missing.
    """
    table = EmbeddingTable.find(folder)
    if table is None:
        return ()
    wanted = sorted(tokenizer.special_ids if template is None else _used(template))
    present = [token for token in wanted if token < len(table.raw)]
    lifeless = {token for token in wanted if token >= len(table.raw)}
    everyone = [token for token in sorted(tokenizer.added_tokens) if token < len(table.raw)][-MAX_TWINS:]
    ordinary = _ordinary(table, tokenizer)
    if present and len(ordinary):
        dead = _about_nothing(table.rows(present), ordinary)
        twins = _twins(table.rows(everyone), ordinary)
        lifeless |= {token for token, is_dead in zip(present, dead) if is_dead}
        lifeless |= {token for token, is_twin in zip(everyone, twins) if is_twin} & set(present)
    return tuple(tokenizer.added_tokens[token] for token in sorted(lifeless))


def missing_embeddings(folder: Path, rows: Stored, tokenizer: TextTokenizer) -> list[Finding]:
    """Return one error if a row holds an id without a row in the base's embedding table.

    Without safetensors in `folder` its config.json says how many rows the table has.
    """
    count = _table_rows(folder)
    if count is None or rows.facts["largest_id"] < count:
        return []
    store = rows.rows
    places = np.flatnonzero((store.tokens & ~SUPERVISED) >= count)
    found = np.searchsorted(store.offsets, places, side="right") - 1
    token = int(store.tokens[places[0]] & ~SUPERVISED)
    every = Rows(store)
    examples = tuple(every.source(int(row)) for row in np.unique(found)[:EXAMPLES])
    message = (
        f"the token '{excerpt(tokenizer.token_of(token) or '')}' has the id {token:,}, "
        f"and the base's embedding table has {count:,} rows"
    )
    rule = CODES["D048"]
    return [Finding("D048", Severity.ERROR, message, examples[0], rule.why, rule.fix, len(np.unique(found)), examples)]


def _table_rows(folder: Path) -> int | None:
    table = EmbeddingTable.find(folder)
    if table is not None:
        return len(table.raw)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = (config.get("text_config") or config).get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) else None


def _used(template: Template) -> set[int]:
    """Return the added tokens of a plain conversation."""
    turns = (Turn("user", "Hi"), Turn("assistant", "Hello."))
    return set(template.encode(Record(turns, "probe")).ids) & set(template.tokenizer.added_tokens)


def _ordinary(table: EmbeddingTable, tokenizer: TextTokenizer) -> NDArray[np.float32]:
    """Return a sample (tokens, hidden) of the rows of ordinary tokens, evenly spaced."""
    last = min(len(table.raw), tokenizer.vocab_size) - 1
    picked = np.unique(np.linspace(0, max(last, 0), SAMPLE).astype(int))
    return table.rows(int(token) for token in picked if token not in tokenizer.added_tokens)


def _about_nothing(rows: NDArray[np.float32], ordinary: NDArray[np.float32]) -> NDArray[np.bool_]:
    centre = ordinary.mean(axis=0)
    norms, usual_norm = np.linalg.norm(rows, axis=1), np.median(np.linalg.norm(ordinary, axis=1))
    apart = np.linalg.norm(rows - centre, axis=1)
    usual_apart = np.percentile(np.linalg.norm(ordinary - centre, axis=1), 5)
    found: NDArray[np.bool_] = (
        ~np.isfinite(norms) | (norms < MIN_NORM * usual_norm) | (apart < MIN_DISTANCE * usual_apart)
    )
    return found


def _twins(rows: NDArray[np.float32], ordinary: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return a mask over `rows` (tokens, hidden): True if another row is nearly equal."""
    near = TWIN_DISTANCE * np.median(np.linalg.norm(ordinary, axis=1))
    wide = rows.astype(np.float64)
    squares = np.einsum("th,th->t", wide, wide)
    distances = squares[:, None] + squares[None, :] - 2 * wide @ wide.T
    np.fill_diagonal(distances, np.inf)
    found: NDArray[np.bool_] = (distances < near**2).any(axis=1)
    return found
