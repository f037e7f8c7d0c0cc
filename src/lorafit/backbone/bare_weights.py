"""Bare weights: linears whose weight a model's own code reads, past the linear's forward.

Mamba's kernels take `out_proj.weight`, Gemma 3n clamps its coefficients in place. An adapter on such a linear would be
passed over without an error, and a 4-bit weight is no matrix to that code.
"""

from __future__ import annotations

import inspect
import re
from functools import cache

from torch import nn

# a slice is read by tensor-parallel branches alone (Bloom)
READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\[|\.(?:dtype|device|shape|size))")


def bare_weights(model: nn.Module) -> set[str]:
    """Return the dotted names of the modules of `model` whose weight their parent's code reads."""
    found = set()
    for path, module in model.named_modules():
        for name in _read_by(type(module)).intersection(dict(module.named_children())):  # type: ignore[arg-type]
            found.add(f"{path}.{name}" if path else name)
    return found


@cache
def _read_by(kind: type[nn.Module]) -> frozenset[str]:
    if not kind.__module__.startswith("transformers."):
        return frozenset()
    return frozenset(READ.findall(inspect.getsource(kind)))
