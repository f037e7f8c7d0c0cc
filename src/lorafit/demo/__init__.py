"""demo: a tiny bundled base and three tasks, with the code that made them.

Only `make_base` needs more than pure Python.
"""

from pathlib import Path

from lorafit.demo.tasks import TASKS, Task, split_files, task_named, write_split

BASE = Path(__file__).parent / "base"
RECIPE = Path(__file__).parent / "recipe.yaml"

__all__ = ["BASE", "RECIPE", "TASKS", "Task", "split_files", "task_named", "write_split"]
