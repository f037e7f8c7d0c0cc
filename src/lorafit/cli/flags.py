"""Flags that several verbs share, and how they become settings. The list is frozen by a test."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorafit.errors import UsageError

Data = Annotated[
    list[str], typer.Argument(help="Data files, globs, a folder, a hub id; or one recipe YAML.", show_default=False)
]
Base = Annotated[str | None, typer.Option("--base", help="Base model: a local folder or a hub id.", show_default=False)]
Run = Annotated[str, typer.Argument(help="The run directory that train made.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting of a recipe; repeatable.", show_default=False),
]
Goal = Annotated[
    str | None, typer.Option("--goal", help="balanced, budget, accuracy, latency or tenants.", show_default=False)
]
Gpu = Annotated[
    str | None, typer.Option("--gpu", help="Plan for this card instead of the one here.", show_default=False)
]
GpuMemory = Annotated[str | None, typer.Option("--gpu-memory", help="Memory budget, as 8GiB.", show_default=False)]
OnBad = Annotated[
    str | None, typer.Option("--on-bad", help="Rows that cannot be read: stop or drop.", show_default=False)
]
OnLong = Annotated[
    str | None, typer.Option("--on-long", help="Rows over max_length: error, drop or split-turns.", show_default=False)
]
Map = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="FIELD=NAME", help="Where a field is: response=answer_text.", show_default=False),
]
Holdout = Annotated[
    str | None, typer.Option("--holdout", help="Held-out share of the rows, or a file.", show_default=False)
]
Select = Annotated[
    str | None,
    typer.Option("--select", help="Of warnings and notes only these, by code prefix: D01,P5.", show_default=False),
]
Ignore = Annotated[
    str | None,
    typer.Option("--ignore", help="Without these: warnings by code prefix, errors by whole code.", show_default=False),
]


def settings_from(assignments: list[str] | None, **flags: Any) -> dict[str, Any]:
    """Settings out of --set and the named flags. Flags not given are left out.

    Raises UsageError for a --set that no setting has, and for a setting that is given two different values.
    """
    from lorafit.config import parse_assignments, reject_unknown  # pydantic stays out of --help

    settings = parse_assignments(assignments or [])
    reject_unknown(settings, "flags")
    given = {key: value for key, value in flags.items() if value is not None}
    if "field_map" in given:
        given["field_map"] = {key: str(value) for key, value in parse_assignments(given["field_map"], "--map").items()}
    if "holdout" in given:
        given["holdout"] = parse_assignments([f"holdout={given['holdout']}"])["holdout"]
    for codes in ("select", "ignore"):
        if codes in given:
            given[codes] = [code.strip() for code in given[codes].split(",")]
    for key, value in given.items():
        if settings.get(key) not in (None, value):
            flag = f"--{key.replace('_', '-')}"
            raise UsageError(f"{flag} is '{value}', and --set says '{settings[key]}'", fix="name it once")
    return {**settings, **given}
