"""Finding: one judgement with a code, like a linter's rule.

Every code has a section in docs/findings.md. Packages return findings; only `cli/` prints them.

    P0          settings that cannot finish
    P1 … P7     the classic pitfalls of a LoRA run
    D0xx        the data
    V0xx        the merged artefact
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

CODES = (
    *(f"D{number:03}" for number in range(1, 58)),
    *(f"P{number}" for number in range(10)),
    "R001",
    *(f"S{number:03}" for number in range(1, 7)),
    "V001",
    "V002",
)
"""Every code of a finding."""
PAGES = (Path(__file__).with_name("findings.md"), Path(__file__).parents[2] / "docs" / "findings.md")
"""Places of the page of all findings: inside an installed package, else in the repository."""


class Severity(StrEnum):
    """Severity of a finding.

    An ERROR stops the run before it starts. A WARNING is shown and recorded, INFO is recorded.
    """

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


@dataclass(frozen=True, slots=True)
class Finding:
    """Hold one judgement.

    Attributes:
        code: Code of the rule.
        severity: How bad it is.
        message: What was found.
        where: A `file:line`, a settings key or a path.
        why: Why it matters.
        fix: What to do about it.
        count: Occurrences, when one finding stands for many rows.
        examples: The first few places of those rows.
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
        """Return a JSON-ready mapping; `from_dict` is the inverse."""
        return asdict(self) | {"severity": self.severity.value, "examples": list(self.examples)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Finding:
        """Return the finding that `to_dict` wrote."""
        return cls(**{**fields, "severity": Severity(fields["severity"]), "examples": tuple(fields["examples"])})


def is_code_prefix(text: str) -> bool:
    """Return True when a code starts with `text`."""
    return bool(text) and any(code.startswith(text) for code in CODES)


def explanations() -> dict[str, tuple[str, str]]:
    """Return code -> (title, text) of every finding, from docs/findings.md."""
    page = next(page for page in PAGES if page.is_file()).read_text(encoding="utf-8")
    sections = re.findall(r"^## ([A-Z]\d+): (.*)\n((?:(?!#).*\n?)*)", page, re.MULTILINE)
    return {code: (title, text.strip()) for code, title, text in sections}


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return True when any finding is an error."""
    return any(finding.severity is Severity.ERROR for finding in findings)


def chosen(findings: Iterable[Finding], select: Iterable[str] = (), ignore: Iterable[str] = ()) -> list[Finding]:
    """Return the findings for which `is_chosen` is true."""
    wanted, unwanted = tuple(select), tuple(ignore)
    return [finding for finding in findings if is_chosen(finding.code, finding.severity, wanted, unwanted)]


def is_chosen(code: str, severity: Severity, select: tuple[str, ...], ignore: tuple[str, ...]) -> bool:
    """Return True when a finding is reported.

    Warnings and notes need a code that starts with one of `select` (empty: any) and with none of `ignore`. Errors are
    always reported, unless `ignore` holds their whole code.
    """
    if severity is Severity.ERROR:
        return code not in ignore
    return (not select or code.startswith(select)) and not code.startswith(ignore)
