"""The demo: a tiny bundled base, three tasks, and how both were made. Pure Python but for `make_base`."""

from pathlib import Path

from lorafit.demo.tasks import TASKS, Task, task_named, write_split

BASE = Path(__file__).parent / "base"
RECIPE = Path(__file__).parent / "recipe.yaml"

__all__ = ["BASE", "RECIPE", "TASKS", "Task", "task_named", "write_split"]
