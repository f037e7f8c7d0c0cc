"""check: read and judge every row, and with a base the settings too; no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.api.plan import plan_prepared
from lorafit.api.settings import require_data, settle, template_for
from lorafit.config import Resolved
from lorafit.data import Prepared, Template, prepare
from lorafit.data.summary import Progress
from lorafit.errors import AdapterError, BackboneError
from lorafit.findings import Finding, Severity, has_errors
from lorafit.planning import hardware_here

PITFALLS = tuple(f"P{number}" for number in range(1, 8))


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `ok` is False when training would refuse."""

    resolved: Resolved
    prepared: Prepared
    template: Template | None
    pitfalls: tuple[Finding, ...] = ()

    @property
    def findings(self) -> list[Finding]:
        return [*self.prepared.findings, *self.pitfalls]

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
    data: Sequence[str | Path] | str | Path | None = None,
    /,
    base: str | Path | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    **settings: Any,
) -> CheckReport:
    """Judge the rows of `data`; with a `base` also as its tokenizer and chat template see them, and the settings
    by the pitfalls P1 to P7 (whether the run fits this machine is for `plan` to say).

    `settings` are keys of RunConfig. Raises DataError for a file that cannot be read at all.
    """
    resolved = settle(data, {**settings, "base": base})
    require_data(resolved)
    template = template_for(resolved) if resolved.config.base else None
    prepared = prepare(resolved.config, template, on_progress=on_progress)
    return CheckReport(resolved, prepared, template, _pitfalls(resolved, prepared) if template else ())


def _pitfalls(resolved: Resolved, prepared: Prepared) -> tuple[Finding, ...]:
    try:
        planned = plan_prepared(resolved, prepared, hardware_here(resolved.config))
    except (AdapterError, BackboneError) as error:
        # the data are read: say what is wrong with the targets beside what was found in the rows
        return (Finding("P1", Severity.ERROR, error.what, where=error.where or "targets", fix=error.fix or ""),)
    return tuple(finding for finding in planned.plan.findings if finding.code in PITFALLS)
