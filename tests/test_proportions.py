"""The proportions of the package: small functions, readable files, folders one can take in, and no import circle."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "lorafit"
FILES = sorted(SRC.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES})
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION, MOST_FILES_OF_A_FOLDER = 400, 45, 12


def name_of(path: Path) -> str:
    return str(path.relative_to(SRC))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_and_each_of_its_functions_can_be_read_at_once(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES_OF_A_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_a_folder_holds_few_modules(folder: Path) -> None:
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_FILES_OF_A_FOLDER, modules


def imports_between_modules() -> dict[str, set[str]]:
    """Module -> lorafit modules that it imports anywhere, function bodies included, `TYPE_CHECKING` blocks left out."""
    modules = {".".join(("lorafit", *path.relative_to(SRC).with_suffix("").parts)) for path in FILES}
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(("lorafit", *path.relative_to(SRC).with_suffix("").parts))
        tree = ast.parse(path.read_text())
        typing_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        }
        wanted: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    wanted.add(whole if whole in modules else node.module)
        arrows[name] = {other for other in wanted if other in modules and other != name}
    return arrows


def test_no_import_runs_in_a_circle() -> None:
    arrows = imports_between_modules()
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in done:
            for other in sorted(arrows[module]):
                walk(other, (*path, module))
            done.add(module)

    for module in sorted(arrows):
        walk(module, ())
