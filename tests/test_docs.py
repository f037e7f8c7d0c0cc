"""The docs say what the code does: commands, settings, paths, links and examples are checked against it."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import typer
import yaml

import made_data as made
import made_tokenizers
from fork_server import typed_program
from little_run import write_rows
from lorafit.cli.app import app
from lorafit.config import RunConfig, resolve
from lorafit.data.checks.findings import CODES
from lorafit.export import FORMATS
from lorafit.methods import METHODS
from lorafit.objectives import OBJECTIVES
from lorafit.shapes.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(DOCS.rglob("*.md"))]
LINKING = [*PAGES, ROOT / "bench" / "README.md", *sorted((ROOT / "bench" / "notebook").glob("*.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
EVERYWHERE = {"--json", "--debug", "--help", "--version"}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page that are written in `language`."""
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """Every `lorafit …` that the page tells the reader to type."""
    fenced = [line for kind in ("", "sh") for block in blocks(page, kind) for line in block.splitlines()]
    typed = [found[1] for line in fenced if (found := re.match(r"\s*(?:docker run .*? )?(lorafit [a-z].*)", line))]
    return [*typed, *re.findall(r"`(lorafit [a-z][^`]*)`", prose(page))]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_and_flag_that_a_page_names_exists(page):
    for line in commands(page):
        words = shlex.split(line.replace("…", ""), comments=True)
        if words[1] == "help":
            continue
        assert words[1] in COMMANDS, line
        known = {flag for option in COMMANDS[words[1]].params for flag in (*option.opts, *option.secondary_opts)}
        flags = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert flags <= known | EVERYWHERE, f"{line}: {flags - known}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_setting_that_a_page_writes_is_one_and_takes_the_value(page):
    for key, value in re.findall(r"--set (\w+)=([^\s`…]+)", page.read_text(encoding="utf-8")):
        if key.isupper() or key == "key":
            continue
        assert key in RunConfig.model_fields, key
        if value != "...":
            RunConfig(**{key: value})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_recipe_on_a_page_can_be_read(page):
    for block in blocks(page, "yaml"):
        recipe = yaml.safe_load(block)
        if "base" in recipe:
            assert resolve({}, recipe).config.base == recipe["base"]


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_every_link_leads_to_a_page_and_a_heading(page):
    for target in re.findall(r"\]\((?!http)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{name_of(page)} → {target}"
        if anchor:
            assert anchor in anchors(there), f"{name_of(page)} → {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that Markdown renderers make of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_a_page_names_exists(page):
    for path in re.findall(r"`((?:[a-z_]+/)+(?:\w+\.(?:py|ya?ml|csv))?)`", prose(page)):
        if path.split("/")[0] in {"runs", "data", "checkpoints", "adapter", "exports"}:
            continue  # parts of a run directory and of users' folders
        assert any((root / path).exists() for root in (ROOT, ROOT / "src" / "lorafit", page.parent)), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_pages_use_the_words_of_the_field(page):
    text = re.sub(r"model cards?", "", page.read_text(encoding="utf-8"))
    if page.name == "CONTRIBUTING.md":
        text = text[: text.index("| not | but |")]
    assert not re.findall(r"\b(?:cards?|verbs?|dials?|rehears\w+|vram)\b", prose_without_code(text), re.IGNORECASE)


def prose_without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.exists():
            continue
        reached.add(page)
        links = re.findall(r"\]\((?!http)([^)#\s]+\.md)", prose(page))
        waiting += [(page.parent / link).resolve() for link in links]
    assert {name_of(page) for page in PAGES} <= {name_of(page) for page in reached}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_generated_pages_are_those_of_todays_code():
    for path, text in generator().pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run python docs/generate.py"


def test_the_settings_page_has_every_setting_and_the_command_page_every_command():
    settings = (DOCS / "reference" / "settings.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", settings, flags=re.MULTILINE) == list(RunConfig.model_fields)
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert re.findall(r"^## lorafit (\w+)", page, flags=re.MULTILINE) == [
        name for name, command in COMMANDS.items() if not command.hidden
    ]


def test_every_finding_has_a_section():
    page = (DOCS / "findings.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## ([A-Z]\d+): \S", page, flags=re.MULTILINE)
    assert len(sections) == len(set(sections))
    others = ["V001", "R001", *(f"P{number}" for number in range(8)), *(f"S00{number}" for number in range(1, 6))]
    for code in [*CODES, *others]:
        assert code in sections, f"docs/findings.md has no section {code}"


@pytest.mark.parametrize(("mark", "file"), [("main path", "api/train.py"), ("one step", "training/loop.py")])
def test_the_architecture_page_quotes_the_code_that_runs(mark, file):
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    quoted = re.search(rf"<!-- {mark} -->\n```python\n(.*?)```", page, re.DOTALL)
    assert quoted is not None and len(quoted[1].splitlines()) >= 5
    assert solid(quoted[1]) in solid((ROOT / "src/lorafit" / file).read_text(encoding="utf-8"))


def solid(code: str) -> str:
    """Code without white space: a page has other line lengths than the file."""
    return "".join(code.split())


def test_every_function_on_the_path_of_a_row_is_in_the_file_beside_it():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|`]*\| (`[^|]*) \| `([^`|]+\.py)` \|$", page, flags=re.MULTILINE)
    assert len(rows) >= 20
    for functions, file in rows:
        code = (ROOT / "src/lorafit" / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", functions):
            for part in name.split("."):
                assert re.search(rf"^ *(?:class|def) {part}\b", code, flags=re.MULTILINE), f"{name} in {file}"


def test_the_architecture_page_has_every_package():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    table = page[page.index("## Packages") : page.index("## The main path")]
    listed = {
        name for row in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"`(\w+)/`", row)
    }
    assert listed == {path.parent.name for path in (ROOT / "src" / "lorafit").glob("*/__init__.py")}


def test_the_python_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 60)
    examples = blocks(DOCS / "guides" / "python.md", "python")
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/guides/python.md", "exec"), names)


def test_the_extending_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", 60)
    examples = blocks(DOCS / "extending.md", "python")
    assert len(examples) == 8
    names: dict[str, object] = {}
    with (
        patch.dict(METHODS),
        patch.dict(FORMATS),
        patch.dict(OBJECTIVES),
        patch.dict(FAMILIES),
    ):  # what the page adds is gone afterwards
        for example in examples:
            exec(compile(example, "docs/extending.md", "exec"), names)
        assert METHODS["norms"] and FORMATS["text"] and FAMILIES["arcee"]


def test_the_data_pages_example_runs(tmp_path, monkeypatch):
    base = made_tokenizers.family_folder(tmp_path / "base", "qwen2_5")
    made.write(tmp_path / "rows.jsonl", [made.row(number) for number in range(30)])
    monkeypatch.chdir(tmp_path)
    (example,) = blocks(DOCS / "guides" / "data.md", "python")
    exec(example.replace("path/or/hub-id", str(base)), {})
    assert (tmp_path / "runs" / "first" / "split.tsv").is_file()


@pytest.mark.slow
def test_the_quickstart_runs_as_it_is_typed(tmp_path):
    page = DOCS / "quickstart.md"
    (tmp_path / "tickets.csv").write_bytes((DOCS / "examples" / "tickets.csv").read_bytes())
    script = [block.replace("--lr 2e-3", "--lr 2e-3 --set max_steps=8") for block in blocks(page, "sh")]
    first = next(index for index, block in enumerate(script) if block.startswith("lorafit check"))
    script[first] = f"! {script[first]}"  # it has to stop: no column is called the answer
    (serving,) = blocks(page, "python")
    (tmp_path / "serve.py").write_text(serving)
    here = f'set -e; python() {{ {shlex.quote(sys.executable)} "$@"; }}'
    text = "\n".join([here, *script, "python serve.py"])
    with typed_program() as folder:
        paths = {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        given = {"cwd": tmp_path, "env": {**os.environ, **paths}}
        ended = subprocess.run(["bash", "-c", text], **given, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "verified" in ended.stdout
