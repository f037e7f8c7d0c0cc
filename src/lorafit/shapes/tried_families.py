"""Tried families: what a run of bench/families.py saw of each model family. The table is `tried_families.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True, slots=True)
class TriedFamily:
    """Hold what works with one family, tried on a tiny random base.

    Attributes:
        name: Model type of config.json.
        rows: `packed`, `padded` or `alone` (one row a forward); empty for a family that does not train.
        qv: Names that the preset `qv` adapts; empty if it does not train.
        all_linear: Names that the preset `all-linear` adapts; empty if it does not train.
        chat: Whether the trained run answers.
        merge: Whether merges onto both bases pass their verification.
        same: Whether first loss and merged logits are those of plain transformers and PEFT.
        reason: First sentence that refused something; empty when all works.
    """

    name: str
    rows: str
    qv: tuple[str, ...]
    all_linear: tuple[str, ...]
    chat: bool
    merge: bool
    same: bool
    reason: str

    @property
    def works(self) -> bool:
        """True when every stage works."""
        return bool(self.qv and self.all_linear) and self.chat and self.merge and self.same

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return asdict(self) | {"works": self.works}


@dataclass(frozen=True, slots=True)
class TriedFamilies:
    """Hold the table of families.

    Attributes:
        date: Day of the run.
        versions: Package -> version that it ran with.
        families: The families in alphabetical order.
        unbuilt: Family -> why transformers built no tiny base of it, so that it could not be tried.
    """

    date: str
    versions: Mapping[str, str]
    families: tuple[TriedFamily, ...]
    unbuilt: Mapping[str, str]


def tried_families() -> TriedFamilies:
    """Return the table that the package carries."""
    content = json.loads(TABLE.read_text(encoding="utf-8"))
    rows = (
        TriedFamily(**(row | {key: tuple(row[key]) for key in ("qv", "all_linear")})) for row in content["families"]
    )
    return TriedFamilies(content["date"], content["versions"], tuple(rows), content.get("unbuilt", {}))
