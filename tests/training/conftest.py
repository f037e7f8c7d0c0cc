"""What tests of this room share."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def parity():
    """bench/parity.py, which imports what lies beside it."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module("parity")
    finally:
        sys.path.remove(str(BENCH))
