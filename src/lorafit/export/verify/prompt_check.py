"""prompt_check: write the exported chat template, and verify that it renders training's prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaError
from transformers import AutoTokenizer

from lorafit.export.companions import set_chat_template
from lorafit.export.finished_run import FinishedRun, Golden
from lorafit.export.formats import OwnTokenizer
from lorafit.findings import Finding, Severity
from lorafit.runs import RunDir

V001, V002 = "V001", "V002"
CHECKED_ROWS = 64

CLEANING = """\
{%- set cleaned = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set message = dict(message.items() | rejectattr("1", "none")) -%}
{%- if message["content"] is string -%}
{%- set content = message["content"].replace("\\r\\n", "\\n").replace("\\r", "\\n").rstrip() -%}
{%- set cleaned.messages = cleaned.messages + [dict(message, content=content)] -%}
{%- else -%}
{%- set cleaned.messages = cleaned.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = cleaned.messages -%}
"""
"""The cleaning of contents by `lorafit.data`, in Jinja, for templates that do not clean contents themselves."""


def write_chat_template(run: FinishedRun, folder: Path) -> list[Finding]:
    """Set the trained chat template in `folder`, and check it on the run's golden prompts.

    The base's template is used unchanged if it trims contents as training did, and behind CLEANING otherwise. Returns
    finding V001 if `AutoTokenizer.apply_chat_template` gives other ids than training in both cases.
    """
    findings: list[Finding] = []
    for prelude in ("", CLEANING):
        set_chat_template(folder, prelude + run.template.jinja_for_export)
        findings = _check(folder, run.golden)
        if not findings:
            break
    return findings


def check_own_tokenizer(
    run: FinishedRun, folder: Path, form: OwnTokenizer, prompts: Sequence[Golden] | None = None
) -> tuple[list[list[int]], list[Finding]]:
    """Return the ids that the serving program gives `prompts`, by default the golden ones.

    Finding V002 is returned too if one of them, or a held-out conversation, has other ids than training. They are
    rendered by transformers, and tokenized by the program in one go, which loads the export once.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    asked = run.golden if prompts is None else prompts
    texts = [_text(tokenizer, each.messages, prompt=True) for each in asked]
    rows = [_text(tokenizer, messages, prompt=False) for messages in _held_out(run)]
    expected = [each.ids for each in asked]
    expected += [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rows]
    found = form.tokenize(folder, [*texts, *rows])
    for text, ours, theirs in zip([*texts, *rows], expected, found, strict=True):
        if ours != theirs:
            return found[: len(texts)], [_own_tokenizer_finding(text, ours, theirs)]
    return found[: len(texts)], []


def _text(tokenizer: Any, messages: Any, *, prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False))


def _held_out(run: FinishedRun) -> list[Any]:
    """Return the messages of the held-out rows that the run kept; rows with tools are left out."""
    path = RunDir(run.folder).samples
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:CHECKED_ROWS]
    samples = [json.loads(line) for line in lines]
    return [sample["messages"] for sample in samples if not sample.get("tools")]


def _own_tokenizer_finding(text: str, ours: list[int], theirs: list[int]) -> Finding:
    place = next((n for n, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs)))
    return Finding(
        V002,
        Severity.ERROR,
        f"the serving program's tokenizer gives other ids than training, from token {place} of {text[:60]!r} on",
        where="the export",
        why="a model answers worse, without any error, if its prompt differs from training",
        fix="serve the merged safetensors with transformers or vLLM, and report this tokenizer",
    )


def _check(folder: Path, prompts: tuple[Golden, ...]) -> list[Finding]:
    for golden in prompts:
        found = _rendered(folder, golden.messages)
        if found != golden.ids:
            return [_finding(found, golden)]
    return []


def _rendered(folder: Path, messages: Any) -> list[int] | str:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    except (JinjaError, OSError, ValueError, TypeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return list(encoded["input_ids"])


def _finding(found: list[int] | str, golden: Golden) -> Finding:
    got = found if isinstance(found, str) else f"{len(found)} ids, {found[:12]}…"
    return Finding(
        V001,
        Severity.ERROR,
        f"the exported chat template gives {got} where training had {len(golden.ids)} ids, {golden.ids[:12]}…",
        where="chat_template.jinja",
        why="a model answers worse, without any error, if its prompt differs from training",
        fix="serve the run with lorafit, which keeps the trained prompt, and report this base",
    )
