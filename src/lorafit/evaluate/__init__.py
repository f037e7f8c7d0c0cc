"""evaluate: metrics on rows, with their noise, and models compared."""

from lorafit.evaluate.answers import Question, Reply, longest_answer, questions_of, replies
from lorafit.evaluate.evaluation import KNOWN, LOSS, Evaluation, Metric, ModelScores, ScoredRow
from lorafit.evaluate.exact_match import ExactMatch, Sample, exact_match
from lorafit.evaluate.statistics import Difference, Estimate

__all__ = [
    "KNOWN",
    "LOSS",
    "Difference",
    "Estimate",
    "Evaluation",
    "ExactMatch",
    "Metric",
    "ModelScores",
    "Question",
    "Reply",
    "Sample",
    "ScoredRow",
    "exact_match",
    "longest_answer",
    "questions_of",
    "replies",
]
