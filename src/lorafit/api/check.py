"""check: read and judge every row; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.api.settings import settle
from lorafit.config import Resolved
from lorafit.data import Prepared, Template, TextTokenizer, prepare
from lorafit.data.progress import Progress
from lorafit.errors import UsageError
from lorafit.findings import Finding, has_errors


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `ok` is False when training would refuse."""

    resolved: Resolved
    prepared: Prepared
    template: Template | None

    @property
    def findings(self) -> list[Finding]:
        return self.prepared.findings

    @property
    def ok(self) -> bool:
        return not has_errors(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return {
            "ok": self.ok,
            "summary": self.prepared.summary.to_dict(),
            "findings": [finding.to_dict() for finding in self.findings],
        }


def check(
    data: Sequence[str | Path] | str | Path,
    base: str | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> CheckReport:
    """Judge the rows of `data`; with a `base` also as its tokenizer and chat template see them.

    `settings` are keys of RunConfig. Raises DataError for a file that cannot be read at all.
    """
    resolved = settle(data, {**settings, "base": base})
    if not resolved.config.data:
        raise UsageError("no data were named", fix="pass a JSONL file, a folder, or a recipe with data in it")
    template = template_for(resolved) if resolved.config.base else None
    return CheckReport(resolved, prepare(resolved.config, template, on_progress=on_progress), template)


def template_for(resolved: Resolved) -> Template:
    """The template rows of this run are rendered with."""
    config = resolved.config
    return Template.for_tokenizer(TextTokenizer.from_base(config.base, config.revision))
