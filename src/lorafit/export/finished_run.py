"""FinishedRun: the parts of a run directory that exports need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafit.config import RunConfig, read_json
from lorafit.data.template.template import MAX_TEMPLATE_BYTES, Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError
from lorafit.export.lineage import Lineage
from lorafit.runs import LAST, ChosenWeights, RunDir, choose_weights


class Golden(NamedTuple):
    """Hold a conversation and its prompt in training.

    Attributes:
        messages: the conversation.
        ids: token ids of its prompt in training.
    """

    messages: list[dict[str, Any]]
    ids: list[int]


@dataclass(frozen=True)
class FinishedRun:
    """Hold the parts of a finished run that exports need.

    Attributes:
        folder: the run directory.
        config: the settings.
        weights: the trained weights.
        template: the chat template, checked against `golden`.
        tokenizer: the base's tokenizer.
        golden: conversations with the prompt ids that they had in training.
    """

    folder: Path
    config: RunConfig
    weights: ChosenWeights
    template: Template
    tokenizer: TextTokenizer
    golden: tuple[Golden, ...]

    @classmethod
    def open(cls, folder: Path, checkpoint: str = LAST) -> FinishedRun:
        """Read the run in `folder`, with the weights of `checkpoint`: last, best or a step.

        Raises RunDirError if a part is missing, AdapterError if the adapter is not the trained one, TemplateError if
        prompts would differ, and UsageError or CheckpointError for a checkpoint that is not kept whole.
        """
        run = RunDir.open(folder)
        return cls.of(run, choose_weights(run, checkpoint))

    @classmethod
    def of(cls, run: RunDir, weights: ChosenWeights) -> FinishedRun:
        """Read the parts of `run` beside the trained `weights`, which are not read."""
        config = run.config()
        tokenizer = TextTokenizer.from_base(config.base, config.revision)
        template = Template.load(run.template, tokenizer)
        golden = read_json(run.template, TemplateError, max_bytes=MAX_TEMPLATE_BYTES)["golden"]
        prompts = tuple(Golden(each["messages"], each["ids"]) for each in golden)
        return cls(run.path, config, weights, template, tokenizer, prompts)

    @property
    def adapter(self) -> Path:
        """Return the folder of the trained weights."""
        return self.weights.folder

    def lineage(self) -> Lineage | None:
        """Return the lineage of the trained weights; None for a run of an older release, which wrote none."""
        run, weights = RunDir(self.folder), self.weights
        last = Lineage.read(run.adapter)
        if last is None or weights.step is None:
            return last
        return last.at_step(weights.step, weights.eval_loss, run.metrics)
