"""The examples in docs/ run as they stand."""

import re
from pathlib import Path
from unittest.mock import patch

import pytest

from little_run import write_rows
from lorafit.config import RunConfig
from lorafit.data.checks.findings import CODES
from lorafit.export import FORMATS
from lorafit.methods import METHODS
from lorafit.shapes.families import FAMILIES

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)


def test_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 60)
    examples = blocks("python.md", "python")
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/python.md", "exec"), names)


def test_the_extending_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 60)
    examples = blocks("extending.md", "python")
    assert len(examples) == 8
    names: dict[str, object] = {}
    with patch.dict(METHODS), patch.dict(FORMATS), patch.dict(FAMILIES):  # what the page adds is gone afterwards
        for example in examples:
            exec(compile(example, "docs/extending.md", "exec"), names)
        assert METHODS["norms"] and FORMATS["text"] and FAMILIES["arcee"]


def test_the_recipe_page_lists_every_setting_with_its_default():
    page = (ROOT / "docs" / "recipe.md").read_text()
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", page, flags=re.MULTILINE))
    assert list(listed) == list(RunConfig.model_fields)
    for key, field in RunConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        assert listed[key] == ("–" if default in (None, (), "", {}) else f"`{default}`"), key


def test_every_finding_has_a_section():
    page = (ROOT / "docs" / "findings.md").read_text()
    sections = re.findall(r"^## ([A-Z]\d+): \S", page, flags=re.MULTILINE)
    assert len(sections) == len(set(sections))
    others = ["V001", "R001", *(f"P{number}" for number in range(8)), *(f"S00{number}" for number in range(1, 6))]
    for code in [*CODES, *others]:
        assert code in sections, f"docs/findings.md has no section {code}"


@pytest.mark.parametrize("page", [*sorted(path.name for path in (ROOT / "docs").glob("*.md")), "../README.md"])
def test_links_between_pages_lead_somewhere(page):
    path = ROOT / "docs" / page
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} → {target}"
