"""The house's one rule: arrows between rooms point one way, lazy imports counted."""

import ast
from functools import cache
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "lorafit"
# a room may import the rooms of lower levels, never its own level's neighbours or anything above
LEVELS = [
    ["errors", "imports"],
    ["findings", "plugins"],
    ["config", "programs"],
    ["runs"],
    ["data"],
    ["hardware", "shapes"],
    ["memory"],
    ["planning"],
    ["backbone"],
    ["methods"],
    ["engine"],
    ["objectives"],
    ["training", "evaluate", "export", "serve", "report"],
    ["demo"],
    ["api"],
    ["cli"],
]
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
SEAMS = {"bitsandbytes": "backbone", "peft": "methods"}
NO_TORCH = {
    "errors",
    "imports",
    "findings",
    "plugins",
    "config",
    "programs",
    "runs",
    "data",
    "hardware",
    "shapes",
    "memory",
    "planning",
}
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}
FILES = sorted(SRC.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


@cache
def nodes_of(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_a_room_imports_only_rooms_below_it(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    for name in imports_of(path):
        if name.startswith("lorafit."):
            other = name.split(".")[1]
            if other != room and other in LEVEL_OF:
                assert LEVEL_OF[other] < LEVEL_OF[room], f"{room} imports {other} ({name})"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_bitsandbytes_and_peft_have_one_seam_each(path: Path) -> None:
    for name in imports_of(path):
        package = name.split(".")[0]
        if package in SEAMS:
            assert room_of(path) == SEAMS[package], f"{path} imports {package}"
        if room_of(path) in NO_TORCH:
            assert package not in HEAVY, f"{path} imports {package}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SRC)))
def test_only_cli_prints(path: Path) -> None:
    if room_of(path) == "cli":
        return
    for node in nodes_of(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{path}:{node.lineno} prints"
    assert not any(name.split(".")[0] == "rich" for name in imports_of(path)), f"{path} imports rich"


def test_every_room_has_a_level() -> None:
    assert {room_of(path) for path in FILES} - {"__init__", "__main__"} <= set(LEVEL_OF)
