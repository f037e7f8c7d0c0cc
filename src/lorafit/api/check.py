"""check: read and judge every row, and with a base the settings; no torch."""

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
from lorafit.hardware import hardware_here

PITFALLS = tuple(f"P{number}" for number in range(1, 10))


@dataclass(frozen=True)
class CheckReport:
    """Hold the result of `check`.

    Attributes:
        resolved: the settings.
        prepared: the rows that were read, with their findings; `check` writes no file of rejected rows.
        template: the chat template; None without a base.
        pitfalls: findings about the settings.
    """

    resolved: Resolved
    prepared: Prepared
    template: Template | None
    pitfalls: tuple[Finding, ...] = ()

    @property
    def findings(self) -> list[Finding]:
        return [*self.prepared.findings, *self.pitfalls]

    @property
    def ok(self) -> bool:
        """Return False if training would refuse the data or the settings."""
        return not has_errors(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
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
    """Judge the rows of `data`, and with a `base` their tokens and the settings.

    A base adds its tokenizer and chat template, and the pitfalls P1 to P9. `plan` tells whether the run fits this
    machine. `settings` are keys of RunConfig. Raises DataError for a file that cannot be read at all.
    """
    resolved = settle(data, {**settings, "base": base})
    require_data(resolved)
    template = template_for(resolved) if resolved.config.base else None
    prepared = prepare(resolved.config, template, on_progress=on_progress, reads_rows=False)
    return CheckReport(resolved, prepared, template, _pitfalls(resolved, prepared) if template else ())


def _pitfalls(resolved: Resolved, prepared: Prepared) -> tuple[Finding, ...]:
    if not len(prepared.train):
        return ()  # the findings of the rows say why
    try:
        planned = plan_prepared(resolved, prepared, hardware_here(resolved.config))
    except (AdapterError, BackboneError) as error:
        # report wrong targets beside the findings of the rows, which are already read
        return (Finding("P1", Severity.ERROR, error.what, where=error.where or "targets", fix=error.fix or ""),)
    return tuple(finding for finding in planned.plan.findings if finding.code in PITFALLS)
