"""chosen_gpus: the number of GPUs that `lorafit train` takes, by the settings or by the plan. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorafit.api.plan import plan_on_gpus
from lorafit.api.settings import require_base, require_data, settle, template_for
from lorafit.config import Resolved
from lorafit.data import prepare
from lorafit.data.summary import Progress
from lorafit.errors import LorafitError
from lorafit.hardware import Hardware, hardware_here
from lorafit.planning import Decision
from lorafit.runs import RunIdentity
from lorafit.runs.lookup import find_target


def chosen_gpus(
    data: Sequence[str | Path],
    settings: Mapping[str, Any],
    *,
    restart: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
    detect: Callable[..., Hardware] = hardware_here,
) -> Decision | None:
    """Return the decision for `gpus`; None within a launcher's process, and on a machine with one GPU.

    Where the settings name none, a resumed run keeps its number, and a new one has that of its plan.
    """
    if "WORLD_SIZE" in os.environ:
        return None
    resolved = settle(data or None, dict(settings))
    if resolved.config.gpus is not None:
        return Decision("gpus", resolved.config.gpus, "set by you", resolved.sources["gpus"].value)
    require_data(resolved)
    require_base(resolved)
    hardware = detect(resolved.config)
    if hardware.count == 1:
        return None
    target = find_target(resolved, restart=restart)
    if target.resumes and not target.run.is_finished:
        began = RunIdentity.read(target.run.identity).processes
        return Decision("gpus", min(began, hardware.count), f"the run began on {began}")
    return _planned(resolved, hardware, on_progress)


def _planned(resolved: Resolved, hardware: Hardware, on_progress: Callable[[Progress], None] | None) -> Decision | None:
    """Return the plan's decision; None for data that cannot be planned, which the run itself reports."""
    try:
        # the processes find the rows in the cache
        prepared = prepare(resolved.config, template_for(resolved), on_progress=on_progress, reads_rows=False)
        plan = plan_on_gpus(resolved, prepared, hardware).plan
    except LorafitError:
        return None
    return next(one for one in plan.decisions if one.key == "gpus")
