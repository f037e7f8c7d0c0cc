"""evaluate: metrics on held-out rows."""

from lorafit.evaluate.exact_match import ExactMatch, Sample, exact_match

__all__ = ["ExactMatch", "Sample", "exact_match"]
