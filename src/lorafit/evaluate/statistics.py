"""statistics: means over rows with their confidence intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
Z = 1.959963984540054
"""Standard normal quantile of a 95 % interval."""
CHUNK_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Estimate:
    """Hold a mean and its 95 % confidence interval.

    Attributes:
        mean: the mean over rows, weighted.
        low: the lower end.
        high: the upper end.
    """

    mean: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return {"mean": self.mean, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True)
class Difference:
    """Hold the mean difference of the same rows under two models, with its 95 % interval.

    Attributes:
        estimate: the difference, second model minus first.
        higher_is_better: the direction of the metric.
    """

    estimate: Estimate
    higher_is_better: bool

    @property
    def verdict(self) -> Literal["better", "worse", "no difference shown"]:
        """Return the verdict of the interval; one that holds 0 shows no difference."""
        low, high = self.estimate.low, self.estimate.high
        if not low > 0 and not high < 0:
            return "no difference shown"
        return "better" if (low > 0) == self.higher_is_better else "worse"


def share(values: Sequence[float]) -> Estimate:
    """Return the share of ones among `values`, each 0 or 1, with Wilson's interval."""
    count = len(values)
    mean = sum(values) / count
    middle = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count))
    return Estimate(mean, max(0.0, min(mean, middle - half)), min(1.0, max(mean, middle + half)))


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0) -> Estimate:
    """Return the weighted mean of `values` with the percentile interval of 10,000 resamples of rows.

    Rows are drawn with their weights, so that a loss by tokens is resampled by rows. The same seed gives the same
    interval. One row has no interval: both ends are its value.
    """
    numbers = np.asarray(values, np.float64)
    weight = np.ones_like(numbers) if weights is None else np.asarray(weights, np.float64)
    mean = float((numbers * weight).sum() / weight.sum())
    if not np.isfinite(numbers).all():
        return Estimate(mean, mean, mean)
    drawn = _resampled(numbers * weight, weight, seed)
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(mean, float(low), float(high))


def paired(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    higher_is_better: bool = True,
) -> Difference:
    """Return the difference of two models on the same rows, second minus first (paired bootstrap)."""
    assert len(first) == len(second), "both models answer the same rows"
    differences = (np.asarray(second, np.float64) - np.asarray(first, np.float64)).tolist()
    return Difference(bootstrap(differences, weights), higher_is_better)


def _resampled(sums: NDArray[np.float64], weights: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return the weighted means (RESAMPLES,) of rows drawn with replacement."""
    random, count = np.random.default_rng(seed), len(sums)
    step = max(1, CHUNK_BYTES // (8 * count))
    parts = []
    for start in range(0, RESAMPLES, step):
        rows = random.integers(0, count, (min(step, RESAMPLES - start), count))
        parts.append(sums[rows].sum(1) / weights[rows].sum(1))
    return np.concatenate(parts)
