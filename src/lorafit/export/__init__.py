"""Merged weights, and the proof that they are the model that was trained."""

from lorafit.export.merge import MergeReport, merge
from lorafit.export.verify import Verification, verify

__all__ = ["MergeReport", "Verification", "merge", "verify"]
