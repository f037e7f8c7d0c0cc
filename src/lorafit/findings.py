"""Finding: one judgement with a code, like a linter's rule. Every code has a section in docs/findings.md.

`P0` is what cannot finish, `P1`..`P7` are the classic pitfalls of a LoRA run, `D0xx` judge the data, `V0xx` the merged
artefact. Rooms return findings; only `cli/` prints them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad: an ERROR stops the run before it starts, a WARNING is shown and recorded, INFO is recorded."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was seen (`message`), where, why it matters, and the fix.

    `where` is a `file:line`, a settings key or a path; `count` says how often, when one finding speaks for
    many rows, and `examples` then names the first few places.
    """

    code: str
    severity: Severity
    message: str
    where: str = ""
    why: str = ""
    fix: str = ""
    count: int = 1
    examples: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; `from_dict` is its inverse."""
        return asdict(self) | {"severity": self.severity.value, "examples": list(self.examples)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Finding:
        """The finding that `to_dict` wrote."""
        return cls(**{**fields, "severity": Severity(fields["severity"]), "examples": tuple(fields["examples"])})


def has_errors(findings: Iterable[Finding]) -> bool:
    """True when any finding must stop the run."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def chosen(findings: Iterable[Finding], select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Finding]:
    """The findings that `is_chosen` leaves."""
    wanted, unwanted = tuple(select), tuple(ignore)
    return [finding for finding in findings if is_chosen(finding.code, finding.severity, wanted, unwanted)]


def is_chosen(code: str, severity: Severity, select: tuple[str, ...], ignore: tuple[str, ...]) -> bool:
    """Whether a finding is to be reported. Of warnings and notes those whose code starts with one of `select` (all,
    when empty) and with none of `ignore`; an error always, unless `ignore` has its whole code."""
    if severity is Severity.ERROR:
        return code not in ignore
    return (not select or code.startswith(select)) and not code.startswith(ignore)
