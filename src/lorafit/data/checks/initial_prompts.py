"""initial_prompts: whether an initial adapter was trained with the tokenizer and the chat template of this run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorafit.config import RunConfig, read_json
from lorafit.data.checks.findings import CODES
from lorafit.data.template.template import Template
from lorafit.data.tokenizer.tokenizer import TextTokenizer
from lorafit.errors import LorafitError, TemplateError
from lorafit.findings import Finding, Severity
from lorafit.runs import InitialAdapter

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def initial_prompt_findings(config: RunConfig, template: Template) -> list[Finding]:
    """Return a finding if `config.init_adapter` was trained on prompts that `template` would not make.

    An adapter folder without a tokenizer tells nothing, and has no finding.
    """
    if config.init_adapter is None:
        return []
    adapter = InitialAdapter.open(config.init_adapter)
    try:
        changes = list(_of_run(adapter.run.template, template) if adapter.run else _of_folder(adapter.folder, template))
    except LorafitError as error:
        changes = [f"they cannot be compared: {error.what}"]
    if not changes:
        return []
    rule = CODES["D057"]
    message = f"{rule.title}: {'; '.join(changes)}"
    return [Finding("D057", Severity.WARNING, message, config.init_adapter, rule.why, rule.fix)]


def _of_run(path: Path, template: Template) -> Iterator[str]:
    """Yield the differences to the template.json of a run."""
    saved, tokenizer = read_json(path, TemplateError), template.tokenizer
    if saved.get("vocabulary_sha256", tokenizer.vocabulary_hash) != tokenizer.vocabulary_hash:
        yield "the tokenizer has other tokens"
    asked = [(golden["messages"], golden["ids"]) for golden in saved.get("golden", ())]
    if any(template.prompt_ids(messages) != ids for messages, ids in asked):
        yield "the chat template makes other prompts"
    if tuple(saved.get("stop_ids", template.stop_ids)) != template.stop_ids:
        yield "another token ends an answer"


def _of_folder(folder: Path, template: Template) -> Iterator[str]:
    """Yield the differences to the tokenizer and the chat template beside an adapter."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return
    tokenizer = TextTokenizer.from_folder(folder)
    if tokenizer.vocabulary_hash != template.tokenizer.vocabulary_hash:
        yield "the tokenizer has other tokens"
    if tokenizer.chat_template is not None:
        theirs = Template.for_tokenizer(tokenizer)
        if theirs.golden_prompts() != template.golden_prompts():
            yield "the chat template makes other prompts"
        if theirs.stop_ids[0] != template.stop_ids[0]:
            yield "another token ends an answer"
