"""Finding: one judgement with a code, like a linter's rule. Every code has a section in docs/findings.md.

`P0` is what cannot finish, `P1`..`P7` are the classic pitfalls of a LoRA run, `D0xx` judge the data, `V0xx` the merged
artefact. Rooms return findings; only `cli/` prints them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

CODES = (
    *(f"D{number:03}" for number in (*range(1, 37), *range(40, 46), 50)),
    *(f"P{number}" for number in range(8)),
    "R001",
    *(f"S{number:03}" for number in range(1, 6)),
    "V001",
)
"""Every code. Each has a section in docs/findings.md."""
PAGES = (Path(__file__).with_name("findings.md"), Path(__file__).parents[2] / "docs" / "findings.md")
"""The page of all findings: inside an installed package, else in the repository."""


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


def is_code_prefix(text: str) -> bool:
    """True when a code begins with `text`."""
    return bool(text) and any(code.startswith(text) for code in CODES)


def explanations() -> dict[str, tuple[str, str]]:
    """Code -> (title, text) of every finding, as docs/findings.md has them."""
    page = next(page for page in PAGES if page.is_file()).read_text(encoding="utf-8")
    sections = re.findall(r"^## ([A-Z]\d+): (.*)\n((?:(?!#).*\n?)*)", page, re.MULTILINE)
    return {code: (title, text.strip()) for code, title, text in sections}


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
