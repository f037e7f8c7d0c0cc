"""flags: the flags of several commands, and their conversion to settings.

A test freezes the list of flags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from lorafit.errors import LorafitError, UsageError

Data = Annotated[
    list[str] | None,
    typer.Argument(help="Data files, globs, a folder, a hub id; or one recipe YAML.", show_default=False),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model: a local folder or a hub id.", show_default=False),
]
Run = Annotated[str, typer.Argument(help="Run directory of a trained run.", show_default=False)]
Checkpoint = Annotated[
    str,
    typer.Option("--checkpoint", metavar="WHICH", help="Weights of the run: last, best by held-out loss, or a step."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set any setting; repeatable. 'lorafit settings' lists them.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", metavar="FOLDER", help="Run directory; default runs/DATA-BASE.", show_default=False),
]
Goal = Annotated[
    str | None,
    typer.Option(
        "--goal",
        metavar="GOAL",
        help="Goal of the plan: balanced, budget, accuracy, latency or tenants.",
        show_default=False,
    ),
]
Gpu = Annotated[
    str | None, typer.Option("--gpu", metavar="GPU", help="Plan for this GPU, as 4090 or 2x4090.", show_default=False)
]
Gpus = Annotated[
    str | None, typer.Option("--gpus", metavar="NUMBER", help="GPUs to train on: a number, or all.", show_default=False)
]
GpuMemory = Annotated[
    str | None,
    typer.Option("--gpu-memory", "--vram", metavar="SIZE", help="Limit of GPU memory, as 8GB.", show_default=False),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method", metavar="METHOD", help="Training method: lora, or full for every weight.", show_default=False
    ),
]
Lr = Annotated[str | None, typer.Option("--lr", metavar="NUMBER", help="Peak learning rate.", show_default=False)]
Epochs = Annotated[
    str | None, typer.Option("--epochs", metavar="NUMBER", help="Passes over the training rows.", show_default=False)
]
Rank = Annotated[str | None, typer.Option("--rank", metavar="NUMBER", help="LoRA rank.", show_default=False)]
MaxLength = Annotated[
    str | None, typer.Option("--max-length", metavar="NUMBER", help="Most tokens of a row.", show_default=False)
]
Batch = Annotated[
    str | None, typer.Option("--batch", metavar="NUMBER", help="Examples in one optimizer step.", show_default=False)
]
OnBad = Annotated[
    str | None, typer.Option("--on-bad", metavar="WORD", help="Unreadable rows: stop or drop.", show_default=False)
]
OnLong = Annotated[
    str | None,
    typer.Option(
        "--on-long",
        "--long",
        metavar="WORD",
        help="Rows over max_length: error, drop or split-turns.",
        show_default=False,
    ),
]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="FIELD=NAME", help="Column of a field: response=answer_text.", show_default=False),
]
Encoding = Annotated[
    str | None,
    typer.Option("--encoding", metavar="NAME", help="How text files are written, as cp1252.", show_default=False),
]
Holdout = Annotated[
    str | None,
    typer.Option(
        "--holdout", metavar="SHARE", help="Held-out share of the rows, as 10%, or a file.", show_default=False
    ),
]
Select = Annotated[
    str | None,
    typer.Option(
        "--select",
        metavar="CODES",
        help="Show only these warnings and notes, by code prefix: D01,P5.",
        show_default=False,
    ),
]
Ignore = Annotated[
    str | None,
    typer.Option(
        "--ignore", metavar="CODES", help="Hide warnings by code prefix, errors by whole code.", show_default=False
    ),
]
FLAGS = {"examples_per_step": "batch", "field_map": "map"}
"""Setting -> its flag, if the flag has another name."""
READ_AS_VALUES = ("holdout", "gpus", "lr", "epochs", "rank", "max_length", "examples_per_step")


def settings_from(assignments: list[str] | None, **flags: Any) -> dict[str, Any]:
    """Return the settings from --set and the named flags, without flags that are not given.

    Raises UsageError for an unknown setting in --set, and for a setting with two different values.
    """
    from lorafit.config import RunConfig, parse_assignments, reject_unknown  # pydantic stays out of --help
    from lorafit.config.setting_aliases import our_name

    settings = parse_assignments(assignments or [])
    reject_unknown(settings, "flags")
    given = {key: value for key, value in flags.items() if value is not None}
    if "field_map" in given:
        given["field_map"] = {key: str(value) for key, value in parse_assignments(given["field_map"], "--map").items()}
    for key in READ_AS_VALUES:
        if key in given:
            given[key] = parse_assignments([f"{key}={given[key]}"])[key]
    for codes in ("select", "ignore"):
        if codes in given:
            given[codes] = [code.strip() for code in given[codes].split(",")]
    for name, value in settings.items():
        key = our_name(name, RunConfig.model_fields)
        if given.get(key) not in (None, value):
            raise UsageError(f"{flag_of(key)} is '{given[key]}', but --set says '{value}'", fix="name it once")
    return {**settings, **given}


def flag_of(key: str) -> str:
    """Return the flag that sets `key`."""
    return f"--{FLAGS.get(key, key).replace('_', '-')}"


VALUES = {
    "--gpu": '"RTX 4090"', "--vram": "8GB", "--set": "lr=1e-4", "--map": "response=answer_text", "--batch": "16",
    "--encoding": "cp1252", "--host": "127.0.0.1", "--port": "8000", "--api-key-file": "key.txt", "--device": "cpu",
    "--against": "runs/other", "--limit": "500", "--least": "exact_match=0.9",
    "--tenants": "tenants.yaml", "--adapter-dir": "runs", "--usage-log": "usage.jsonl", "--max-num-seqs": "16",
    "--checkpoint": "best", "--max-model-len": "4096", "--max-loras": "8", "--out": "folder",
    "--holdout": "10%", "--epochs": "3", "--long": "drop", "--on-bad": "drop", "--on-long": "drop", "--show": "3",
    "--fix": "clean.jsonl", "--prompt": '"Where is my order?"', "--max-new-tokens": "256", "--temperature": "0.7",
    "--system": '"Answer briefly."', "--onto": "original", "--format": "safetensors",
    "--to": "gguf", "--dtype": "bf16", "--quantization": "q8_0", "--name": "orders", "--task": "dates", "--seed": "1",
    "--verify-in": "vllm", "--engine": "vllm",
}  # fmt: skip
"""Examples for flags that are not settings, or whose setting has an example that does not fit here."""


def example_of(flag: str) -> str:
    """Return a value that `flag` takes, as typed."""
    from lorafit.config.setting_reference import describe_setting  # pydantic stays out of --help

    if flag in VALUES:
        return VALUES[flag]
    return describe_setting(flag.removeprefix("--").replace("-", "_")).assignment.partition("=")[2]


OTHER_NAMES = {"export_format": ("--format", "--to"), "gpu_memory": ("--vram",), "on_long": ("--long",)}
"""Parameter or setting -> flags that it has beside its own name's."""


def named_as_typed(error: LorafitError, typed: Sequence[str]) -> None:
    """Name a setting in `error` by its flag, if `typed` has the flag.

    A fix such as `gpu: cpu` becomes `--gpu cpu`, unless a recipe was given, where it is a line.
    """
    given = {word.partition("=")[0] for word in typed}
    names = {error.where or ""} | set(SETTING_LINE.findall(error.fix or ""))
    flags = {name: [flag_of(name), *OTHER_NAMES.get(name, ())] for name in names}
    error.where = next((flag for flag in flags[error.where or ""] if flag in given), error.where)
    if error.fix and not any(word.endswith((".yaml", ".yml")) for word in typed):
        error.fix = assigned_by_flags(error.fix)


def assigned_by_flags(text: str) -> str:
    """Return `text` with settings as the command line gives them: `--gpu cpu` for `gpu: cpu`."""
    from lorafit.config import RunConfig  # pydantic stays out of --help

    def flag(found: re.Match[str]) -> str:
        key, value = found.groups()
        if key not in RunConfig.model_fields:
            return found[0]
        return f"{flag_of(key)} {value}" if key in WITH_A_FLAG else f"--set {key}={value}"

    # a value ends its clause: "warmup: the share of all steps" has none
    value = r" ([^\s;,…]*[^\s;,.…])(?=[;,.…]|$| or )"
    return re.sub(SETTING_LINE.pattern + value, flag, text)


SETTING_LINE = re.compile(r"(?<![\w\"'-])([a-z_]+):(?= [^\s(])")
WITH_A_FLAG = {
    "base", "out", "goal", "gpu", "gpus", "gpu_memory", "method", "lr", "epochs", "rank", "max_length",
    "examples_per_step", "on_bad", "on_long", "encoding", "holdout",
}  # fmt: skip
"""Settings that `plan` takes by a flag of their own."""


def words_of(key: str, value: Any) -> list[str]:
    """Return the words that give the flag of `key` this value; none if it was not given."""
    if value is None or value is False:
        return []
    each = value if isinstance(value, list) else [value]
    return [word for one in each for word in ([flag_of(key)] if one is True else [flag_of(key), str(one)])]


def words_to_read(data: Sequence[str] | None, given: Mapping[str, Any], assignments: Sequence[str] | None) -> list[str]:
    """Return the words of the command line that name the files and say how they are read."""
    words = [*(data or ()), *(word for key in ("encoding", "field_map") for word in words_of(key, given[key]))]
    return words + [word for one in assignments or () for word in ("--set", one)]


def command(name: str, data: Sequence[str] | None, given: Mapping[str, Any], assignments: Sequence[str] | None) -> str:
    """Return the command line of `name` with the same data, flags and settings."""
    from lorafit.cli.screen.console import typed

    words = ["lorafit", name, *(data or ())]
    for key, value in given.items():
        words += words_of(key, value)
    for assignment in assignments or ():
        words += ["--set", assignment]
    return typed(*words)
