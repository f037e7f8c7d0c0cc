"""reference: the commands settings, models, explain and help."""

from __future__ import annotations

import contextlib
import difflib
import json as json_module
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from lorafit.cli import flags
from lorafit.cli.screen.console import PEOPLE, heading, say, show_json
from lorafit.errors import UsageError

if TYPE_CHECKING:
    from lorafit.shapes.tried_families import TriedFamily

SETTINGS_EXAMPLES = """Examples:

lorafit settings

lorafit settings learning_rate"""
MODELS_EXAMPLES = """Examples:

lorafit models

lorafit models qwen3_5_text"""
EXPLAIN_EXAMPLES = """Examples:

lorafit explain D013

lorafit explain"""


def settings(
    name: Annotated[str | None, typer.Argument(help="Setting, by any of its names.", show_default=False)] = None,
    json: flags.Json = False,
) -> None:
    """List every setting, or show one with default, meaning, advice and other names."""
    from lorafit.config import RunConfig  # pydantic stays out of --help
    from lorafit.config.setting_aliases import advice_for, our_name
    from lorafit.config.setting_reference import describe_setting

    if name is None:
        described = [describe_setting(key) for key in RunConfig.model_fields]
        if json:
            show_json([one.to_dict() for one in described])
            return
        table = Table.grid(padding=(0, 2))
        for one in described:
            table.add_row(f"[bold]{one.name}[/bold]", escape(one.shown_default), f"[dim]{escape(one.meaning)}[/dim]")
        PEOPLE.print(table)
        say("[dim]details of one: lorafit settings NAME[/dim]")
        return
    key = our_name(name.removeprefix("--"), RunConfig.model_fields)
    if key not in RunConfig.model_fields:
        raise UsageError(f"no setting '{name:.60}'", fix=advice_for(name, RunConfig.model_fields))
    one = describe_setting(key)
    if json:
        show_json(one.to_dict())
        return
    heading(one.name, f"[dim]{escape(one.meaning)}[/dim]")
    rows = {"default": one.shown_default, "values": one.values, "advice": one.advice, "aliases": ", ".join(one.aliases)}
    _show_rows({**rows, "set it": one.example})


def models(
    family: Annotated[
        str | None, typer.Argument(help="Model type, or a base's folder or hub id.", show_default=False)
    ] = None,
    json: flags.Json = False,
) -> None:
    """List the model families that were tried, or show one: rows, adapters, chat and merge."""
    from lorafit.shapes.tried_families import tried_families

    tried = tried_families()
    chosen = list(tried.families) if family is None else [_family(family, tried.families)]
    if json:
        show_json({"date": tried.date, "versions": tried.versions, "families": [one.to_dict() for one in chosen]})
        return
    if family is not None:
        (one,) = chosen
        marks = {"chat": "yes" if one.chat else "no", "merge": "verified" if one.merge else "no"}
        names = {"qv": ", ".join(one.qv), "all-linear": ", ".join(one.all_linear)}
        heading(one.name, f"[dim]{_ROWS[one.rows]}[/dim]")
        _show_rows({**names, **marks, "reason": one.reason})
        return
    for title, members in _grouped(chosen).items():
        say(f"[bold]{escape(title)}[/bold]")
        PEOPLE.print(Padding(Text(", ".join(members), style="dim"), (0, 0, 0, 2)))
    versions = ", ".join(f"{name} {number}" for name, number in tried.versions.items())
    working = sum(one.works for one in chosen)
    say(f"[dim]{working} of {len(chosen)} work from plan to merge; tiny random bases, {tried.date}, {versions}[/dim]")


def _family(name: str, families: Sequence[TriedFamily]) -> TriedFamily:
    """Return the family called `name`: a model type, or a base's folder, whose config.json has one."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        name = str(json_module.loads((Path(name) / "config.json").read_text(encoding="utf-8")).get("model_type"))
    known = {one.name: one for one in families}
    if name in known:
        return known[name]
    near = _near_family(name, known)
    fix = f"did you mean '{near}'?" if near else "'lorafit plan' with the base says whether it trains"
    raise UsageError(f"no family '{name:.60}' was tried", fix=fix)


def _near_family(name: str, known: Collection[str]) -> str:
    """Return the family that `name` probably means, as qwen3 for Qwen/Qwen3-8B; empty without one."""
    letters = re.sub("[^a-z0-9]", "", name.rpartition("/")[2].lower())
    beginning = max((one for one in known if letters.startswith(re.sub("[^a-z0-9]", "", one))), key=len, default="")
    slip = difflib.get_close_matches(name, known, n=1, cutoff=0.6 if not beginning else 0.9)
    return slip[0] if slip else beginning


def _grouped(families: Iterable[TriedFamily]) -> dict[str, list[str]]:
    """Return the names under what works, best first, and those that do not under their reason."""
    groups: dict[str, list[str]] = {}
    for one in sorted(families, key=lambda one: (not one.works, not one.rows, list(_ROWS).index(one.rows))):
        verdict = "works" if one.works else "in part" if one.rows else "no"
        reason = f": {_short(one.reason)}" if one.reason else ""
        groups.setdefault(f"{verdict}, {_ROWS[one.rows]}{reason}", []).append(one.name)
    return groups


def _short(reason: str) -> str:
    """Return `reason` without the names of the family's own classes."""
    return re.sub(r"^(transformers' )?[A-Z]\w{5,} ", "its model ", reason)


_ROWS = {"packed": "packed rows", "padded": "padded rows", "alone": "one row a forward", "": "does not train"}


def explain(
    code: Annotated[str | None, typer.Argument(help="Code of a finding, as D013.", show_default=False)] = None,
    json: flags.Json = False,
) -> None:
    """Explain a finding by its code. Without a code, list all codes."""
    from lorafit.findings import explanations

    texts = explanations()
    if code is None:
        if json:
            show_json([{"code": one, "title": title, "text": text} for one, (title, text) in texts.items()])
            return
        _show_rows({one: title for one, (title, _) in texts.items()})
        return
    if code.upper() not in texts:
        raise UsageError(f"no finding has the code '{code:.20}'", fix=_near_code(code, texts))
    title, text = texts[code.upper()]
    if json:
        show_json({"code": code.upper(), "title": title, "text": text})
        return
    from rich.markdown import Markdown  # slow to import, and used only here

    heading(code.upper(), f"[bold]{escape(title)}[/bold]")
    PEOPLE.print(Padding(Markdown(text), (0, 0, 0, 2)))


def _near_code(code: str, texts: Mapping[str, Any]) -> str:
    """The code that was meant, as D034 for d34; else where all codes are listed."""
    parts = re.fullmatch(r"([A-Z]+)0*(\d+)", code.upper())
    near = [one for one in texts if parts and re.fullmatch(rf"{parts[1]}0*{parts[2]}", one)]
    return f"did you mean {near[0]}?" if near else "list all codes with 'lorafit explain'"


def help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(help="Command.", show_default=False)] = None,
) -> None:
    """Show the help of lorafit, or of one command."""
    top: Any = context.parent
    if command is None:
        typer.echo(top.get_help())
        return
    found = top.command.get_command(top, command)
    if found is None:
        raise UsageError(f"no command '{command:.40}'", fix="list all with 'lorafit help'")
    with found.make_context(command, ["--help"], parent=top):
        pass


def _show_rows(rows: dict[str, str]) -> None:
    table = Table.grid(padding=(0, 2))
    for name, text in rows.items():
        if text:
            table.add_row(Text(name, style="bold"), text and Text(text))
    PEOPLE.print(Padding(table, (0, 0, 0, 2)))
