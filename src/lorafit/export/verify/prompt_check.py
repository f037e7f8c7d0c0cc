"""prompt_check: write the exported chat template, and verify that it renders training's prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError as JinjaError
from transformers import AutoTokenizer

from lorafit.export.companions import set_chat_template
from lorafit.export.finished_run import FinishedRun, Golden
from lorafit.findings import Finding, Severity

V001 = "V001"

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
