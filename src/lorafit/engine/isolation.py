"""Isolation test: rows that share a micro-batch must have the logits of the same rows alone.

It runs at start-up, on the user's own model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorafit.backbone import unwrapped
from lorafit.engine.attention.packed import unpacked
from lorafit.engine.loss.vocabulary import Row, keeps_logits, supervised_logits
from lorafit.engine.packing import collate
from lorafit.errors import TrainingError

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Largest relative difference that rounding explains, in the second test."""
ROUTING_NOISE = {torch.float32: 1e-5}
"""The same in the first test, for mixtures of experts. Experts multiply the tokens routed to them in one matmul, so one
row's routing changes another's rounding."""
ABOVE_NOISE, MOST_NOISE = 1.25, 0.5
"""Multiple of what rounding in the embeddings changes, up to which experts may differ; and the largest difference."""
SEES_LATER = {torch.float32: 1e-4}
"""Largest relative change of logits by later tokens that rounding explains."""
PROBES = 32
"""Number of supervised tokens of a row whose logits are compared: the first and last ones."""


class LeakError(TrainingError):
    """Raised when rows of a micro-batch see each other.

    Attributes:
        seen: What the test saw, in one clause.
    """

    def __init__(self, model: Any, seen: str, *, padded: bool = False) -> None:
        self.seen = f"{'padded' if padded else 'packed'} rows see each other in this model ({seen})"
        fix = "choose another base, and report this one: lorafit cannot train this family yet"
        super().__init__(self.seen, where=_name(model), fix=fix)


@dataclass(frozen=True, slots=True)
class Isolation:
    """Hold the result of the isolation test.

    Attributes:
        relative_difference: ‖together − alone‖ / ‖alone‖ of the logits, for the worst row.
        rows: Number of rows compared.
    """

    relative_difference: float
    rows: int


def require_isolated(model: Any, rows: Sequence[Row], *, padded: bool = False) -> Isolation:
    """Raise LeakError if rows of one micro-batch see each other in `model`, packed or `padded`.

    `model` must use packed attention for packed rows. There are two tests:
    - Replacing one row, and the padding of the others, must not change a single bit of the other rows' logits in the
      same layout (mixtures of experts: nothing beyond rounding). It finds leaks of any size, such as a recurrent state
      carried on.
    - The logits must equal those of the rows alone, up to rounding. It finds wrong positions and a part of attention
      that is left out. Experts may differ by what rounding in the embeddings alone changes, since a token on the edge
      between two experts goes to the other one.
    """
    was_training = model.training
    model.eval()
    probed = [(ids, _thinned(mask)) for ids, mask in rows]
    try:
        with torch.no_grad():
            _require_unmoved(model, probed, padded)
            worst = _distance_from_alone(model, probed, padded)
    finally:
        model.train(was_training)
    return Isolation(worst, len(rows))


def _thinned(mask: np.ndarray) -> np.ndarray:
    """Return `mask` with only its first and last supervised tokens.

    Every logit of long rows would take gigabytes.
    """
    supervised = np.flatnonzero(mask)
    thinned = np.zeros(len(mask), dtype=bool)
    thinned[supervised[: PROBES // 2]] = thinned[supervised[-PROBES // 2 :]] = True
    return thinned


def uneven(rows: Sequence[Row]) -> list[Row]:
    """Return at least two of `rows`, cut to different lengths, the longest first, so that all but one are padded."""
    several = sorted(rows if len(rows) > 1 else [*rows, *rows], key=lambda row: -len(row[0]))
    cuts = [max(len(ids) * (8 - min(place, 6)) // 8, min(len(ids), 2)) for place, (ids, _) in enumerate(several)]
    return [(ids[:cut], mask[:cut]) for cut, (ids, mask) in zip(cuts, several)]


def _require_unmoved(model: Any, rows: Sequence[Row], padded: bool) -> None:
    first_ids, first_mask = rows[0]
    replaced = np.roll(first_ids, 1) if len(set(first_ids.tolist())) > 1 else np.full_like(first_ids, first_ids[0] + 1)
    device = next(model.parameters()).device
    first, second = (collate(these, padded=padded) for these in (rows, [(replaced, first_mask), *rows[1:]]))
    if padded:
        _replace_padding(second.ids, [len(ids) for ids, _ in rows])
    before, after = (supervised_logits(model, batch.to(device), padded=padded) for batch in (first, second))
    if not before.isfinite().all():
        with unpacked(model):
            require_finite_logits(model, rows)
    others = slice(int(first_mask[1:].sum()), None)
    moved = _relative(after[others].float(), before[others].float())
    if not moved <= (ROUTING_NOISE.get(before.dtype, 5e-3) if _routes(model) else 0.0):
        raise LeakError(model, f"replacing one row changes the other rows' logits by {moved:.1%}", padded=padded)


def _replace_padding(ids: torch.Tensor, lengths: Sequence[int]) -> None:
    """Overwrite the padding in `ids` (1, rows × width) with each row's second token, in place of its first."""
    for row, length in zip(ids.view(len(lengths), -1), lengths, strict=True):
        row[length:] = row[min(1, length - 1)]


def _distance_from_alone(model: Any, rows: Sequence[Row], padded: bool) -> float:
    device = next(model.parameters()).device
    together = supervised_logits(model, collate(rows, padded=padded).to(device), padded=padded)
    worst, start = 0.0, 0
    with unpacked(model):
        for row in rows:
            wanted = _alone(model, row)
            got = together[start : start + len(wanted)].float()
            start += len(wanted)
            worst = max(worst, _relative(got, wanted))
        tolerance = TOLERANCE.get(together.dtype, 1e-1)
        if tolerance < worst <= MOST_NOISE and _routes(model):
            tolerance = max(tolerance, ABOVE_NOISE * max(_rounding_noise(model, row) for row in rows))
    if not worst <= min(tolerance, MOST_NOISE):
        raise LeakError(model, f"logits differ by {worst:.1%} from those of the same rows alone", padded=padded)
    return worst


def _routes(model: Any) -> bool:
    return any("experts" in name for name, _ in model.named_modules())


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-9))


def _rounding_noise(model: Any, row: Row) -> float:
    """Return the relative change of the logits of one row when each of its embeddings' numbers is rounded anew."""
    wanted, generator = _alone(model, row), torch.Generator().manual_seed(0)

    def rounded_anew(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        shift = torch.rand(output.shape, generator=generator).to(output.device) - 0.5
        return (output.float() * (1 + torch.finfo(output.dtype).eps * shift)).to(output.dtype)

    hook = unwrapped(model).get_input_embeddings().register_forward_hook(rounded_anew)
    try:
        return _relative(_alone(model, row), wanted)
    finally:
        hook.remove()


def _alone(model: Any, row: Row) -> torch.Tensor:
    """Return the supervised logits of one row without packing, (supervised tokens, vocabulary), fp32."""
    ids, mask = row
    device = next(model.parameters()).device
    places = torch.from_numpy(np.flatnonzero(mask[1:])).to(device)
    inputs = torch.from_numpy(ids.astype(np.int64))[None].to(device)
    if keeps_logits(model):
        logits: torch.Tensor = model(input_ids=inputs, use_cache=False, logits_to_keep=places).logits[0]
    else:
        logits = model(input_ids=inputs, use_cache=False).logits[0, places]
    return logits.float()


def require_causal(model: Any, row: Row) -> None:
    """Raise TrainingError if the first half of `row` sees its second half, as in an encoder."""
    ids, half = row[0], max(len(row[0]) // 2, 1)
    other = ids.copy()
    other[half:] = np.roll(ids, 1)[half:]
    was_training = model.training
    model.eval()
    mask = np.arange(len(ids)) <= half
    with torch.no_grad():
        before, after = _alone(model, (ids, mask))[:-1], _alone(model, (other, mask))[:-1]
    model.train(was_training)
    moved = _relative(after, before) if len(before) else 0.0
    if not moved <= SEES_LATER.get(next(model.parameters()).dtype, 1e-2):
        raise TrainingError(
            f"tokens see later tokens in this model (logits change by {moved:.1%})",
            where=_name(model),
            fix="choose a causal language model",
        )


def require_finite_logits(model: Any, rows: Sequence[Row]) -> None:
    """Raise TrainingError if rows alone have NaN or infinite logits, so that packing is not the cause."""
    with torch.no_grad():
        if all(bool(_alone(model, row).isfinite().all()) for row in rows):
            return
    raise TrainingError(
        "the base's logits are not finite because its weights are damaged or its activations overflow this precision",
        where=_name(model),
        fix="download the base again, or set compute=fp32",
    )


def _name(model: Any) -> str:
    return type(unwrapped(model)).__name__
