"""The garbage collector is off while torch is imported, and as before afterwards."""

import ast
import gc
from pathlib import Path

import pytest

from lorafit.imports import without_collector

CLI = Path(__file__).parent.parent / "src" / "lorafit" / "cli"
LOADS_TORCH = ("lorafit.api.train", "lorafit.api.merge", "lorafit.api.load", "lorafit.api.ship", "lorafit.serve")


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_off_within_the_block_and_as_before_after_it(was_on):
    try:
        (gc.enable if was_on else gc.disable)()
        with without_collector():
            assert not gc.isenabled()
        assert gc.isenabled() is was_on
        with pytest.raises(ImportError), without_collector():
            raise ImportError
        assert gc.isenabled() is was_on
    finally:
        gc.enable()


def test_objects_that_a_program_froze_stay_frozen():
    frozen = gc.get_freeze_count()  # tests freeze their modules
    with without_collector():
        pass
    assert gc.get_freeze_count() == frozen > 0


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_every_command_that_loads_torch_imports_it_without_the_collector(path):
    tree = ast.parse(path.read_text())
    within = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.With) and "importing_torch()" in ast.unparse(block.items[0])
        for node in ast.walk(block)
    }
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(LOADS_TORCH):
                assert id(node) in within, f"{path.name}:{node.lineno}"
