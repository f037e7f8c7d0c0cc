"""Codes: every one explained."""

import re
from pathlib import Path

import pytest

from lorafit.data.checks.findings import CODES

DOCS = Path(__file__).parents[3] / "docs" / "findings.md"


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_has_a_section_in_the_docs(code: str) -> None:
    assert re.search(rf"^## {code}: \S", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_sections_of_the_docs_are_sorted_and_unique() -> None:
    titles = re.findall(r"^## (\w+):", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles == sorted(set(titles))
