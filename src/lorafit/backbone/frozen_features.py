"""frozen_features: which frozen linear a traced call is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorafit.backbone.frozen_linear_fp8 import frozen_linear_fp8
from lorafit.backbone.frozen_linear_op import frozen_linear, frozen_product


def frozen_features(op: Any, arguments: Sequence[Any]) -> tuple[int, int] | None:
    """(in_features, out_features) of a frozen linear's forward, given the operator called and its arguments.

    None for any other operator, and for a frozen linear's backward. For policies of recomputation.
    """
    if op in (frozen_product, frozen_linear_fp8):
        *_, out_features, in_features, transposed = arguments
    elif op is frozen_linear:
        *_, out_features, in_features, _, _, transposed = arguments
    else:
        return None
    return None if transposed else (in_features, out_features)
