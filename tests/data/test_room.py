"""The room as a whole: quick to import, and without the heavy libraries."""

import subprocess
import sys

HEAVY = ("torch", "transformers", "datasets", "pyarrow", "pandas", "datasketch", "scipy")


def test_importing_the_room_loads_none_of_the_heavy_libraries() -> None:
    code = f"import sys, lorafit.data; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
