"""Objectives: what a run minimises."""

from lorafit.objectives.objective import Objective

__all__ = ["Objective"]
