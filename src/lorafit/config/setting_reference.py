"""Describe each setting: default, values, meaning, advice and other names. Screen and docs are made from this."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin

from lorafit.config.run_config import PLANNED, RunConfig
from lorafit.config.setting_aliases import aliases_of

ADVICE = {
    "base": "Take an instruct model that already does your task halfway.",
    "revision": "Pin a commit where a run must be repeated later.",
    "data": "Run lorafit check on it first.",
    "out": "Name it where two runs share data and base.",
    "field_map": "Set it when check names your columns and finds none of its own.",
    "on_bad": "Use drop once you have read the findings and can do without those rows.",
    "on_long": "Use split-turns for long conversations, drop where a few rows are outliers.",
    "holdout": "Raise it for under 500 rows, so that the held-out loss means something.",
    "select": "Set it to look at one kind of finding alone.",
    "ignore": "Silence what you have read and accept.",
    "max_length": "Set it just above your longest row; plan shows what it costs.",
    "max_unpacked": "Raise it for a packed file that you trust and that unpacks to more.",
    "goal": "Use budget to pay less, accuracy for many rows, tenants for one base with many adapters.",
    "serving": "Use adapters where one base serves several of them.",
    "method": "Leave it: lora is the one method there is today.",
    "objective": "Leave it: sft is the one objective there is today.",
    "quantization": "Use none where the base fits in 16 bits and the last bit of accuracy counts.",
    "compute": "Leave it on auto; try fp8 on Hopper or newer for speed.",
    "rank": "Raise it for more than 10,000 rows or a new skill; halve it when it overfits.",
    "alpha": "Leave it at twice the rank.",
    "dropout": "Raise it to 0.1 for under 1,000 rows; set 0 for the most speed.",
    "targets": "Use all-linear where the data move the model far: a new format, language or domain.",
    "memory_policy": "Leave it on auto; set recompute when memory runs out.",
    "compile": "Set off to look for a fault, or for runs of a few steps.",
    "lr": "Halve it when the loss jumps; double it when the loss hardly falls.",
    "schedule": "Leave it on cosine.",
    "warmup": "Raise it to 0.1 when the first steps are unsteady.",
    "weight_decay": "Leave it.",
    "max_grad_norm": "Lower it to 0.3 when the loss spikes.",
    "optimizer": "Leave it on auto; the 8-bit kinds save memory at high ranks.",
    "epochs": "Lower it when the held-out loss rises before the end.",
    "max_steps": "Set it for a trial run.",
    "examples_per_step": "Lower it for under 500 rows, so that enough steps are taken.",
    "eval_steps": "Set it for long epochs.",
    "save_steps": "Set it where a lost hour is dear; save_minutes usually does.",
    "save_minutes": "Lower it on machines that can be taken away.",
    "max_bad_steps": "Leave it: a run with infinite numbers is wrong.",
    "on_spike": "Use rollback for long runs that nobody watches.",
    "keep_last": "Raise it to look at the run's history.",
    "keep_best": "Raise it to choose among several.",
    "deterministic": "Set it to compare two runs bit by bit on one GPU.",
    "seed": "Change it to see how much of a result is luck.",
    "gpu": "Set it to plan for a GPU you do not have here.",
    "gpu_memory": "Set it to share a GPU, or to plan for a smaller one.",
    "report_to": "Install the tracker first, as in pip install tensorboard.",
}
"""When to change each setting."""
EXAMPLES = {
    "field_map": "{response: answer_text}",
    "data": "rows.jsonl",
    "holdout": "0.1",
    "select": "D01",
    "ignore": "D044",
    "base": "Qwen/Qwen3-8B",
    "revision": "main",
    "out": "runs/first",
    "gpu": "4090",
    "gpu_memory": "8GB",
    "report_to": "tensorboard",
    "memory_policy": "recompute",
    "targets": "all-linear",
    "lr": "1e-4",
    "warmup": "0.1",
    "max_steps": "100",
    "eval_steps": "50",
    "save_steps": "50",
    "deterministic": "true",
}


@dataclass(frozen=True, slots=True)
class SettingReference:
    """One setting.

    Attributes:
        name: its key in a recipe and after --set.
        default: the value where nobody sets it.
        values: the kind of its values, or the words it takes.
        meaning: what it sets.
        advice: when to change it.
        aliases: other names it is taken under.
        is_planned: whether the plan decides it where nobody does.
        assignment: an example, as `lr=1e-4`.
    """

    name: str
    default: Any
    values: str
    meaning: str
    advice: str
    aliases: tuple[str, ...]
    is_planned: bool
    assignment: str

    @property
    def shown_default(self) -> str:
        """The default in words."""
        if self.default is None or self.default in ((), {}, ""):
            return "–"
        planned = " (or as planned)" if self.is_planned and self.default != "auto" else ""
        return f"{self.default}{planned}"

    @property
    def example(self) -> str:
        """How to set it on the command line."""
        quoted = f"'{self.assignment}'" if " " in self.assignment else self.assignment
        return f"--set {quoted}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return asdict(self)


def describe_setting(key: str) -> SettingReference:
    """The reference of the setting `key`."""
    field = RunConfig.model_fields[key]
    default = field.get_default(call_default_factory=True)
    values = "a file, a folder, a hub id, or a list" if key == "data" else _values(field.annotation)
    example = EXAMPLES.get(key, str(default))
    return SettingReference(
        name=key,
        default=default,
        values=values,
        meaning=field.description or "",
        advice=ADVICE.get(key, ""),
        aliases=aliases_of(key),
        is_planned=key in PLANNED,
        assignment=f"{key}={example}",
    )


def _values(annotation: Any) -> str:
    """The words that a type takes, or its name."""
    if get_origin(annotation) is Literal:
        return ", ".join(str(word) for word in get_args(annotation))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): ""}
    if annotation in names:
        return names[annotation]
    if get_origin(annotation) is tuple:
        return "a list, or words with commas between"
    if get_origin(annotation) is dict:
        return "a mapping"
    parts = [_values(part) for part in get_args(annotation) if not isinstance(part, str)]
    return ", or ".join(dict.fromkeys(part for part in parts if part))
