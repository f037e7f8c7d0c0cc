"""verify: compare the merged folder on disk with the model that was trained."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafit.backbone import computing_in, is_mixture, packed_weights, rounding_activations
from lorafit.config import MergeBase
from lorafit.errors import VerificationError
from lorafit.export.formats import ExportFormat, OpenedModel, Row, TransformersModel
from lorafit.export.verify.comparison import Comparison, Reference, median_row
from lorafit.export.verify.stored_base import over_stored_weights
from lorafit.methods import Method
from lorafit.runs import write_text

FLOORS = 10.0
"""Most KL of a correct merge to the live model, in noise floors."""
LEAST_FLOOR = 1e-7
"""Least noise floor, in nats; the floor of weights in fp32 is zero."""
LOSSY_SHARE = 0.01
"""Most KL of a correct quantization under 8 bits, as a share of the KL of the base without its adapter."""
ROUTED_SHARE = 0.05
"""Most mean KL of a correct merge of a mixture, as a share of the KL of the base without its adapter."""
LOSS_MARGIN = 0.05
"""Nats of task loss that a merge onto the original base may lose if the adapter moved the base little."""
VERIFICATION_FILE = "verification.json"
NOT_FINITE = "the merged model's output is not finite"
OVER_STORED = " to the adapter over the base as stored, in the median row,"


@dataclass(frozen=True)
class Verification:
    """Hold the comparison of the merged artefact with the live adapter model.

    A correct merge is near the floor and far from the base. KL is in nats a token.

    Attributes:
        onto: the base that the delta was added to.
        passed: False if the artefact is not the trained model.
        reason: why, in one sentence.
        merged: the artefact against the live model.
        floor: the live model against itself in the other precision.
        base: the base without its adapter against the live model.
        exact: a merge onto the original against the adapter over the base as stored, in the row of the median KL;
            None where that cannot be run.
        exact_floor: the adapter over the base as stored against itself in the other precision.
        live_loss: the live model's own loss.
        rows: held-out rows.
        positions: supervised tokens of these rows.
        live_dtype: the live model's precision.
        merged_dtype: the artefact's precision.
        export_format: the name of the artefact's format.
        elapsed_s: seconds of verification.
    """

    onto: MergeBase
    passed: bool
    reason: str
    merged: Comparison
    floor: Comparison
    base: Comparison
    live_loss: float
    rows: int
    positions: int
    live_dtype: str
    merged_dtype: str
    elapsed_s: float
    export_format: str
    exact: Comparison | None = None
    exact_floor: Comparison | None = None

    @property
    def floors(self) -> float:
        """Return the merged model's KL in units of the noise floor."""
        return self.merged.kl / max(self.floor.kl, 1e-12)

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping. Numbers that are not finite are None, since JSON has no NaN."""
        return _finite(asdict(self) | {"floors": self.floors})


def verify(
    live_model: nn.Module,
    folder: Path,
    rows: Sequence[Row],
    onto: MergeBase,
    *,
    method: Method,
    export_format: ExportFormat,
    reference: Reference | None = None,
    original: Path | None = None,
    earlier: Verification | None = None,
) -> Verification:
    """Open the artefact in `folder` from disk, and compare it with `live_model` on `rows`.

    `live_model` comes from `method.load`. The noise floor compares it with itself in the format's precision, or in fp32
    if it is in that precision. The artefact runs in that precision too: its distance is the floor plus the error of
    merging. `passed` is False if KL > 10 × floor, and in a lossy format if KL > 1 % of the base's.

    A merge onto "original" is another model than the live one. Its KL is to the adapter over the weights in `original`,
    the folder of that base. Without it, or if those weights cannot be run, such a merge fails only if it is further
    from the live model than the base alone and does the task worse.

    `reference` has the live model's probabilities if they are known, and `earlier` an earlier verification with that
    reference; its floor and base are taken in the same precisions. Rows whose log-probabilities exceed 1 GiB in all are
    left out. A mixture may pass in its median row (`_judge_routed`). verification.json is written to the folder.
    """
    started = time.monotonic()
    usable = [row for row in (Row(*each) for each in rows) if len(row.predicting)]
    if not usable:
        raise VerificationError("no held-out row is left to verify with", fix="train with holdout above 0")
    live, dtype, stored = TransformersModel(live_model), _compute_dtype(live_model), export_format.dtype
    reference = reference or Reference.of(live, usable)
    rounded = partial(_in_the_other_precision, live_model, dtype, stored)
    floor, base = _floor_and_base(live, reference, rounded, partial(method.without, live_model), dtype, stored, earlier)
    exact = over_stored_weights(live_model, original, usable, rounded) if original else None
    with export_format.open(folder, next(live_model.parameters()).device, dtype) as artefact:
        merged, exactly = reference.compare(artefact), _exactly(exact, artefact)
    measured = Verification(
        onto, False, "", merged, floor, base, reference.loss, len(reference.rows), reference.positions,
        _name(dtype), _name(stored), time.monotonic() - started, export_format.name, *exactly,
    )  # fmt: skip
    verification = _judged(measured, live_model, lossy=export_format.lossy)
    write_text(folder / VERIFICATION_FILE, json.dumps(verification.to_dict(), indent=2) + "\n")
    return verification


def _floor_and_base(
    live: OpenedModel,
    reference: Reference,
    rounded: Callable[[], AbstractContextManager[Any]],
    without: Callable[[], AbstractContextManager[Any]],
    dtype: torch.dtype,
    stored: torch.dtype,
    earlier: Verification | None,
) -> tuple[Comparison, Comparison]:
    """Return the live model's comparison with itself, rounded and without its adapter."""
    if earlier is not None and (earlier.live_dtype, earlier.merged_dtype) == (_name(dtype), _name(stored)):
        return earlier.floor, earlier.base
    with rounded():
        floor = reference.compare(live)
    with without():
        return floor, reference.compare(live)


def verified_in(
    program: OpenedModel, verification: Verification, live_model: nn.Module, rows: Sequence[Row]
) -> Verification:
    """Return `verification` with the comparison and the verdict of another program that serves the same export.

    Floor and base are those of the first comparison. The export's format loses nothing.
    """
    usable = [row for row in (Row(*each) for each in rows) if len(row.predicting)]
    reference = Reference.of(TransformersModel(live_model), usable)
    merged = reference.compare(program)
    measured = replace(
        verification,
        merged=merged,
        rows=len(reference.rows),
        positions=reference.positions,
        live_loss=reference.loss,
        exact=None,
        exact_floor=None,
    )
    return _judged(measured, live_model, lossy=False)


def _exactly(
    exact: tuple[Reference, Comparison] | None, artefact: OpenedModel
) -> tuple[Comparison | None, Comparison | None]:
    """Return the artefact's comparison with the adapter over the base as stored, and the floor of it."""
    if exact is None:
        return None, None
    reference, floor = exact
    return median_row(reference, map(artefact.log_probabilities, reference.rows)), floor


def _judged(measured: Verification, live_model: nn.Module, *, lossy: bool) -> Verification:
    """Return `measured` with its verdict."""
    is_same = not packed_weights(live_model)  # a merge onto the original is the live model then
    if measured.exact is not None and measured.exact_floor is not None:
        passed, reason = _judge(measured.exact, measured.exact_floor, measured.base, lossy=lossy, what=OVER_STORED)
    elif measured.onto == "original" and not is_same:
        passed, reason = _judge_grossly(measured.live_loss, measured.merged, measured.base)
    else:
        passed, reason = _judge(measured.merged, measured.floor, measured.base, lossy=lossy)
        if not passed and not lossy and is_mixture(live_model):
            passed, reason = _judge_routed(measured.merged, measured.floor, measured.base) or (passed, reason)
    return replace(measured, passed=passed, reason=reason)


def _judge(
    measured: Comparison, floor: Comparison, base: Comparison, *, lossy: bool, what: str = ""
) -> tuple[bool, str]:
    """Return whether the artefact is the model that `measured` compares it with, and why."""
    if not math.isfinite(measured.kl) or not math.isfinite(measured.loss):
        return False, NOT_FINITE
    if lossy:
        bound, measure = LOSSY_SHARE * base.kl, f"{LOSSY_SHARE:.0%} of the distance of the base without adapter"
    else:
        bound, measure = FLOORS * max(floor.kl, LEAST_FLOOR), f"{FLOORS:g} × the noise floor"
    near = measured.kl <= bound
    reason = f"KL {measured.kl:.1e}{what} is {'within' if near else 'above'} {measure} ({bound:.1e})"
    if base.kl < floor.kl:
        reason += "; the adapter moves the base by less than the floor, so this comparison is weak: train it longer"
    return near, reason


def _judge_routed(merged: Comparison, floor: Comparison, base: Comparison) -> tuple[bool, str] | None:
    """Return the verdict in the median row, for a mixture of which a few rows alone are beyond the floor.

    Rounding sends a token near a tie to another expert, and moves its row by more than all rounding together. A wrong
    merge moves most rows. None if it is one, or if the mean has come a share of the way to the bare base.
    """
    bound = FLOORS * max(floor.median_kl, LEAST_FLOOR)
    if not (merged.median_kl <= bound and merged.kl <= ROUTED_SHARE * base.kl):
        return None
    return True, (
        f"KL {merged.median_kl:.1e} in the median row is within {FLOORS:g} × the noise floor ({bound:.1e}); rounding "
        f"sends tokens of other rows to other experts (mean KL {merged.kl:.1e})"
    )


def _judge_grossly(live_loss: float, merged: Comparison, base: Comparison) -> tuple[bool, str]:
    """Return whether a merge onto another base than the live model's can be the trained model, and why."""
    if not math.isfinite(merged.kl) or not math.isfinite(merged.loss):
        return False, NOT_FINITE
    near = merged.kl <= base.kl
    side = "within" if near else "above"
    reason = f"KL {merged.kl:.1e} is {side} the distance of the base without adapter ({base.kl:.1e})"
    if not near and merged.loss <= live_loss + LOSS_MARGIN:
        return True, f"{reason}, and it does the task as well"
    return near, reason


def _compute_dtype(model: Any) -> torch.dtype:
    dtype = model.get_input_embeddings().weight.dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextmanager
def _in_the_other_precision(model: nn.Module, dtype: torch.dtype, stored: torch.dtype) -> Iterator[None]:
    if dtype is stored:
        with computing_in(model, torch.float32):
            yield
    else:
        with computing_in(model, torch.float32, stored), rounding_activations(model, stored):
            yield


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
