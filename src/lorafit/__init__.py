"""lorafit: fine-tune language models with LoRA over a frozen 4-bit base.

Each merged model is measured against the model that was trained.

import lorafit
run = lorafit.train("data.jsonl", base="path/or/hub-id")
lorafit.merge(run.run.path)
"""

from importlib import import_module
from typing import Any

from lorafit.imports import without_collector

__version__ = "0.1.0"

# public name -> its module; loaded on first use, so that `import lorafit` stays free of torch
_HOMES = {
    "check": "lorafit.api.check",
    "plan": "lorafit.api.plan",
    "train": "lorafit.api.train",
    "merge": "lorafit.api.merge",
    "load": "lorafit.api.load",
    "eval": "lorafit.api.ship.eval",
    "AdapterTrainingPipeline": "lorafit.api.pipeline",
    "QUANT_PROFILE": "lorafit.api.pipeline",
    "ADAPTER_CONFIG": "lorafit.api.pipeline",
    "TRAINING_HYPERPARAMS": "lorafit.api.pipeline",
    "RunConfig": "lorafit.config",
    "LorafitError": "lorafit.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorafit' has no attribute '{name}'")
    with without_collector():
        module = import_module(_HOMES[name])
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
