"""What every room's tests share: one trained run, and quiet libraries."""

import gc
import importlib.util
import os
import sys
from itertools import zip_longest

gc.disable()  # until everything is imported, and nothing of it is ever looked through again (pytest_collection_finish)
sys.dont_write_bytecode = False  # else each process rewrites and compiles every file again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.pop("COLUMNS", None)  # pytest-xdist says 80 to its workers; the console reads it when it is imported

import pytest
import torch
from hypothesis import settings

from little_run import write_rows
from lorafit.demo import BASE

# hosts without a network lack the packages of the extras `serve` and `gguf`; CI installs both
NEEDS = {"serve/test_server.py": "openai", "serve/test_launch.py": "openai", "export/formats/test_gguf.py": "gguf"}
collect_ignore = [name for name, package in NEEDS.items() if importlib.util.find_spec(package) is None]

# the same examples on every machine, and no deadline that a busy neighbour could break
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)  # two test processes on two cores: more threads only get in each other's way


def pytest_collection_modifyitems(items):
    """Put files with `slow` tests first; skip `gpu` tests, saying why, where there is no GPU.

    `make test` deals files in this order (`--no-loadscope-reorder`). A long file that starts last keeps one process
    busy while the other has nothing left to do. Files whose tests start several processes (`processes`) alternate
    with others: two of them at a time take three times as long, because their processes wait for each other.
    """
    # marks, not keywords: those hold the names of folders too, and a clone may lie in one called gpu
    several = {item.path for item in items if item.get_closest_marker("processes")}
    slow = {item.path: item.path in several for item in items if item.get_closest_marker("slow")}
    slow |= dict.fromkeys(several, True)
    apart, alone = ([path for path, is_several in slow.items() if is_several == wanted] for wanted in (True, False))
    turns = [*zip_longest(alone, apart)]
    place = {path: turn for turn, paths in enumerate(turns) for path in paths}
    items.sort(key=lambda item: (place.get(item.path, len(turns)), slow.get(item.path, False)))  # stable
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


def pytest_collection_finish():
    """Leave what was imported out of garbage collection: a full one takes a second with it, and runs ask for many."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Rows prepared by tests are cached beside the tests' other files, not in the user's home."""
    import os

    os.environ["LORAFIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def strides_are_asserted():
    """What operators say of their outputs' strides is held against the outputs."""
    from lorafit.engine.layers import decoder as layers

    layers.SIZE_ASSERTS = True


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A run of eight steps on the demo's base: trained enough to differ from it."""
    from lorafit.api.train import train

    folder = tmp_path_factory.mktemp("tiny-run")
    data = write_rows(folder / "tickets.jsonl", 60)
    return train(data, str(BASE), out=folder / "run", lr=5e-3, max_steps=8, holdout=0.2, examples_per_step=8)
