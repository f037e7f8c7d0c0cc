"""vllm: where vLLM is, and the command line and variables with which it serves an exported folder.

vLLM pins a torch of its own, so it usually has an environment of its own, and lorafit runs its program.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorafit.errors import UsageError
from lorafit.programs.program import Program, free_port

VLLM_VARIABLE = "LORAFIT_VLLM"
"""Environment variable with the path of the program `vllm`."""
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Defaults of vLLM on a CPU: 1 GiB of keys and values, and threads that other programs may share."""


def find_vllm() -> Path | None:
    """Return the program `vllm`: named by LORAFIT_VLLM, beside this Python, or on PATH. None if it is not here.

    Raises UsageError if the variable names no program.
    """
    if named := os.environ.get(VLLM_VARIABLE):
        if not (os.access(named, os.X_OK) and Path(named).is_file()):
            fix = f"name the program vllm, or unset {VLLM_VARIABLE}"
            raise UsageError(f"{VLLM_VARIABLE} names no program", where=named, fix=fix)
        return Path(named).absolute()
    beside = Path(sys.executable).parent / "vllm"
    if beside.is_file():
        return beside
    found = shutil.which("vllm")
    return Path(found) if found else None


def vllm_command(program: Path, settings: Mapping[str, Any], port: int) -> list[str]:
    """Return the command line `vllm serve` with `settings`, in the names of vLLM's flags."""
    words = [str(program), "serve", str(settings["model"]), "--host", "127.0.0.1", "--port", str(port)]
    for name, value in settings.items():
        if name == "model" or value is False or value is None:
            continue
        words.append(f"--{name}")
        if value is not True:
            words += [str(each) for each in value] if isinstance(value, list) else [str(value)]
    return words


def vllm_environment(*, on_gpu: bool, loads_adapters: bool = False) -> dict[str, str]:
    """Return the variables for vLLM: no hub, no usage statistics, and with `loads_adapters` loading at run time."""
    fixed = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    fixed |= {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if loads_adapters else {}
    # lorafit's own modules are not vLLM's business
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return ({} if on_gpu else ON_CPU) | inherited | fixed


def vllm_program(
    program: Path, settings: Mapping[str, Any], folder: Path, log: Path, *, on_gpu: bool, loads_adapters: bool = False
) -> Program:
    """Return `vllm serve` with `settings` in `folder`, not started."""
    port = free_port()
    environment = vllm_environment(on_gpu=on_gpu, loads_adapters=loads_adapters)
    return Program("vLLM", vllm_command(program, settings, port), folder, port, log, environment)
