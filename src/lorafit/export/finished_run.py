"""FinishedRun: the parts of a run directory that exports need."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafit.config import RunConfig, read_json
from lorafit.data.template.template import MAX_TEMPLATE_BYTES, Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError
from lorafit.runs import RunDir, require_trained_run


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
        adapter: the adapter's folder.
        template: the chat template, checked against `golden`.
        tokenizer: the base's tokenizer.
        golden: conversations with the prompt ids that they had in training.
    """

    folder: Path
    config: RunConfig
    adapter: Path
    template: Template
    tokenizer: TextTokenizer
    golden: tuple[Golden, ...]

    @classmethod
    def open(cls, folder: Path) -> FinishedRun:
        """Read the run in `folder`.

        Raises RunDirError if a part is missing, AdapterError if the adapter is not the trained one, TemplateError if
        prompts would differ.
        """
        run = RunDir.open(folder)
        require_trained_run(run)
        return cls.of(run, run.adapter)

    @classmethod
    def of(cls, run: RunDir, adapter: Path) -> FinishedRun:
        """Read the parts of `run` beside the trained weights in `adapter`, which are not read."""
        config = run.config()
        tokenizer = TextTokenizer.from_base(config.base, config.revision)
        template = Template.load(run.template, tokenizer)
        golden = read_json(run.template, TemplateError, max_bytes=MAX_TEMPLATE_BYTES)["golden"]
        prompts = tuple(Golden(each["messages"], each["ids"]) for each in golden)
        return cls(run.path, config, adapter, template, tokenizer, prompts)
