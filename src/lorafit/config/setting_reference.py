"""Setting reference: default, values, meaning, advice and aliases of each setting.

`lorafit settings` and docs/reference/settings.md are made from it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_origin

from lorafit.config.run_config import PLANNED, RunConfig
from lorafit.config.setting_aliases import aliases_of

ADVICE = {
    "base": "Choose an instruct model that can already do part of your task.",
    "revision": "Pin a commit when you must repeat the run later.",
    "data": "Run lorafit check on it first.",
    "out": "Set it when two runs share data and base.",
    "encoding": "Set cp1252 for a CSV that Excel saved on Windows; UTF-8 and UTF-16 are recognized.",
    "template": "Name a Jinja file when the base's own template is missing or wrong.",
    "split_answers": "Set it for templates that leave earlier reasoning out, so that every answer is taught.",
    "field_map": "Set it when lorafit check does not recognize your columns.",
    "on_bad": "Use drop once you have read the findings and can do without those rows.",
    "on_long": "Use split-turns for long conversations, drop when few rows are outliers.",
    "holdout": "Raise it for under 500 rows, so that the held-out loss is meaningful.",
    "select": "Set it to show one kind of finding.",
    "ignore": "Set it to hide findings that you have read and accepted.",
    "max_length": "Set it just above your longest row; plan shows what it costs.",
    "max_unpacked": "Raise it for a packed file that you trust and that unpacks to more.",
    "goal": "Use budget to pay less, accuracy for many rows, tenants for one base with many adapters.",
    "serving": "Use adapters when one base serves several of them.",
    "method": "Use full for the most accuracy from many rows, where every weight fits the memory.",
    "objective": "Leave it, or install a package with a loss of your own.",
    "quantization": "Use none when the base fits in 16 bits and accuracy matters most.",
    "compute": "Leave it on auto; try fp8 on Hopper or newer for speed.",
    "init_adapter": "Set it to teach a trained adapter new rows; its rank and targets come with it.",
    "rank": "Raise it for more than 10,000 rows or a new skill; halve it when it overfits.",
    "alpha": "Leave it at twice the rank.",
    "rslora": "Set it with a high rank, so that the delta is not scaled down by it.",
    "dora": "Set it with a low rank and dropout: 0, for accuracy near a higher rank's; steps take longer.",
    "init_lora_weights": "Try pissa with a lower lr for a faster fall of the loss; loftq over NF4 at a high rank.",
    "trainable_tokens": "Name the special tokens of your chat template that the base has, but never saw in training.",
    "new_tokens": "Name marks of your format that should be one token each, as <tool>.",
    "modules_to_save": "Name both for a new language; for a few tokens trainable_tokens takes far less memory.",
    "loraplus_lr_ratio": "Set it to 16 for a new skill, with half the lr.",
    "dropout": "Raise it to 0.1 for under 1,000 rows; set 0 for the most speed.",
    "targets": "Use all-linear for a new format, language or domain; add +experts if a mixture barely moves.",
    "memory_policy": "Leave it on auto; set recompute when memory runs out.",
    "compile": "Set off to debug, or for runs of a few steps.",
    "lr": "Halve it when the loss spikes; double it when the loss hardly falls.",
    "schedule": "Leave it on cosine.",
    "warmup": "Raise it to 0.1 when the first steps are unsteady.",
    "weight_decay": "Leave it.",
    "max_grad_norm": "Lower it to 0.3 when the loss spikes.",
    "optimizer": "Leave it on auto; the 8-bit kinds save memory at high ranks.",
    "shard_base": "Leave it on auto; off keeps a whole base on each GPU.",
    "epochs": "Lower it when the held-out loss rises before the end.",
    "max_steps": "Set it for a trial run.",
    "examples_per_step": "Lower it for under 500 rows, so that enough steps are taken.",
    "eval_steps": "Set it for long epochs.",
    "save_steps": "Set it for a fixed interval in steps; save_minutes is usually enough.",
    "save_minutes": "Lower it on machines that can be preempted.",
    "max_bad_steps": "Leave it: NaN or infinite values mean that the run is broken.",
    "on_spike": "Use rollback for long unattended runs.",
    "keep_last": "Raise it to inspect earlier states of the run.",
    "keep_best": "Raise it to choose among several checkpoints.",
    "deterministic": "Set it to compare two runs bit by bit on one GPU.",
    "seed": "Change it to measure how much a result varies.",
    "gpu": "Set it to plan for a GPU of another machine.",
    "gpus": "Set it to take more or fewer GPUs than the plan does; the steps stay the same.",
    "gpu_memory": "Set it to share a GPU, or to plan for a smaller one.",
    "report_to": "Install the tracker first, as in pip install tensorboard.",
}
"""When to change each setting."""
EXAMPLES = {
    "encoding": "cp1252",
    "template": "template.jinja",
    "field_map": "{response: answer_text}",
    "data": "rows.jsonl",
    "holdout": "0.1",
    "select": "D01",
    "ignore": "D044",
    "base": "Qwen/Qwen3-8B",
    "revision": "main",
    "out": "runs/first",
    "gpu": "4090",
    "gpus": "2",
    "gpu_memory": "8GB",
    "report_to": "tensorboard",
    "memory_policy": "recompute",
    "targets": "all-linear",
    "loraplus_lr_ratio": "16",
    "init_lora_weights": "pissa",
    "trainable_tokens": "<|im_start|>",
    "new_tokens": "<tool>",
    "modules_to_save": "embed_tokens,lm_head",
    "init_adapter": "runs/first",
    "lr": "1e-4",
    "warmup": "0.1",
    "max_steps": "100",
    "eval_steps": "50",
    "save_steps": "50",
    "deterministic": "true",
}


@dataclass(frozen=True, slots=True)
class SettingReference:
    """Describe one setting.

    Attributes:
        name: Key in a recipe and after --set.
        default: Value when nobody sets it.
        values: Type of its values, or the accepted words.
        meaning: What it sets.
        advice: When to change it.
        aliases: Other accepted names.
        is_planned: Whether the plan decides it when nobody sets it.
        assignment: An example, such as `lr=1e-4`.
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
        """Default in words."""
        if self.default is None or self.default in ((), {}, ""):
            return "–"
        planned = " (or as planned)" if self.is_planned and self.default != "auto" else ""
        return f"{self.default}{planned}"

    @property
    def example(self) -> str:
        """Command-line flag that sets the example."""
        quoted = f"'{self.assignment}'" if " " in self.assignment else self.assignment
        return f"--set {quoted}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready mapping."""
        return asdict(self)


def describe_setting(key: str) -> SettingReference:
    """Return the reference of the setting `key`."""
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
    """Return the words that a type accepts, or the type's name."""
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
