"""deterministic: the same bits on every run on the same card, for the price of slower kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lorafit.errors import TrainingError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Within it torch runs only kernels that give the same bits each time; nothing changes unless `asked`.

    An operation that has no such kernel raises TrainingError. cuBLAS reads its setting when CUDA starts in this
    process, so enter before the model is loaded.
    """
    if not asked:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    # nothing here reads memory that it has not written
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise TrainingError(
            f"an operation of this model has no deterministic form ({str(error).partition('.')[0]})",
            where="deterministic",
            fix="train without --deterministic; a resumed run then differs in the last bits",
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark
