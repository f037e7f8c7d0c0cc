"""FinishedRun: what exports need of a run directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lorafit.config import RunConfig, RunDir, read_json, require_trained_adapter
from lorafit.data.template.template import MAX_TEMPLATE_BYTES, Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import TemplateError


class Golden(NamedTuple):
    """A conversation as `messages`, and the `ids` of its prompt in training."""

    messages: list[dict[str, Any]]
    ids: list[int]


@dataclass(frozen=True)
class FinishedRun:
    """The settings, the adapter's folder, the template and the tokenizer of a run.

    `golden` are conversations and the prompt ids they had in training; the template was checked against them.
    """

    folder: Path
    config: RunConfig
    adapter: Path
    template: Template
    tokenizer: TextTokenizer
    golden: tuple[Golden, ...]

    @classmethod
    def open(cls, folder: Path) -> FinishedRun:
        """Read the run. Raises RunDirError when a part is missing, AdapterError when the adapter is not the one that
        was trained, TemplateError when prompts would differ."""
        run = RunDir.open(folder)
        require_trained_adapter(run)
        config = run.config()
        tokenizer = TextTokenizer.from_base(config.base, config.revision)
        template = Template.load(run.template, tokenizer)
        golden = read_json(run.template, TemplateError, max_bytes=MAX_TEMPLATE_BYTES)["golden"]
        prompts = tuple(Golden(each["messages"], each["ids"]) for each in golden)
        return cls(folder, config, run.adapter, template, tokenizer, prompts)
