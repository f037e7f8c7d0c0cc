"""Where each setting came from: default < recipe < flag, and the plan for what nobody set."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafit.config.foreign_text import parse_yaml, read_recipe
from lorafit.config.run_config import PLANNED, TEXTS, RunConfig
from lorafit.config.setting_aliases import SETTING_ALIASES
from lorafit.errors import UsageError


class Source(StrEnum):
    """Who set a value."""

    DEFAULT = "default"
    RECIPE = "recipe"
    FLAG = "flag"
    PLAN = "plan"
    RUN = "run"


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and, for each, who set it."""

    config: RunConfig
    sources: Mapping[str, Source]

    def is_set(self, key: str) -> bool:
        """True when a recipe, a flag or the run going on set `key` to more than "auto": the plan leaves it alone."""
        return self.sources[key] in (Source.RECIPE, Source.FLAG, Source.RUN) and getattr(self.config, key) != "auto"

    def going_on(self, run: RunConfig, keys: Iterable[str]) -> Resolved:
        """The same settings with `run`'s values for those of `keys` that nobody set: they were planned back then."""
        values = {key: getattr(run, key) for key in keys if not self.is_set(key)}
        config = self.config.model_copy(update=values)
        return Resolved(config, {**self.sources, **dict.fromkeys(values, Source.RUN)})

    def planned(self, values: Mapping[str, Any]) -> Resolved:
        """The same settings with the plan's `values` for the keys in PLANNED that nobody set."""
        unknown = set(values) - set(PLANNED)
        assert not unknown, f"the plan may not decide {sorted(unknown)}"
        fresh = {key: value for key, value in values.items() if not self.is_set(key)}
        config = _validated({**self.config.model_dump(), **fresh}, "plan")
        return Resolved(config, {**self.sources, **dict.fromkeys(fresh, Source.PLAN)})

    def table(self) -> list[tuple[str, Any, str]]:
        """(key, value, source) of every setting, in the order of RunConfig."""
        return [(key, getattr(self.config, key), self.sources[key].value) for key in type(self.config).model_fields]


def resolve(recipe: Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None) -> Resolved:
    """Settle every setting: flags over the recipe over the defaults; None among flags means 'not given'.

    Raises UsageError for an unknown key (naming the nearest valid one) or a value that does not fit. When a
    rank is set without an alpha, alpha follows it at alpha / rank = 2.
    """
    recipe = dict(recipe or {})
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    for name, values in (("the recipe", recipe), ("flags", flags)):
        reject_unknown(values, name)
    sources = dict.fromkeys(RunConfig.model_fields, Source.DEFAULT)
    sources |= dict.fromkeys(recipe, Source.RECIPE) | dict.fromkeys(flags, Source.FLAG)
    values = {**recipe, **flags}
    if "rank" in values and "alpha" not in values:
        values["alpha"] = 2 * _validated({"rank": values["rank"]}, "rank").rank
        sources["alpha"] = sources["rank"]
    return Resolved(_validated(values, "settings"), sources)


def load_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe YAML; paths in it stay as written. Raises UsageError when it is no recipe."""
    loaded = read_recipe(path, TEXTS)
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UsageError("a recipe is a mapping of settings", where=str(path), fix="write lines like 'rank: 16'")
    return loaded


def parse_assignments(assignments: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """`key=value` pairs as `flag` takes them; values are read as YAML scalars or lists, those of TEXTS as they are."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"'{assignment}' is not key=value", where=flag, fix=f"write it like {flag} KEY=VALUE")
        try:
            is_text = flag != "--set" or key.strip() in TEXTS
            value = _text(text.strip()) if is_text else _number(parse_yaml(text)) if text else ""
        except yaml.YAMLError as error:
            raise UsageError(
                f"'{text[:80]}' is not a value", where=f"{flag} {key.strip()}", fix="quote it for the shell"
            ) from error
        if values.setdefault(key.strip(), value) != value:
            raise UsageError(f"'{key.strip()}' is {values[key.strip()]} and {value}", where=flag, fix="name it once")
    return values


def _text(text: str) -> Any:
    # '*.jsonl', '007' and '2026-01-01' mean themselves; quotes and brackets are YAML's
    if text[:1] in ("[", "{", "'", '"') and text:
        return parse_yaml(text)
    return None if text in ("null", "~") else text


def _number(value: Any) -> Any:
    # YAML 1.1 reads '2e-4' as text (it wants 2.0e-4); everyone who types a learning rate means the number
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def reject_unknown(values: Mapping[str, Any], name: str) -> None:
    """UsageError for a key of `values` that is no setting, with the nearest one; `name` says where it stands."""
    for key in values:
        if key == "trust_remote_code":
            raise UsageError(
                "lorafit never runs Python code out of a base's folder",
                where=key,
                fix="leave it out, and choose a base that transformers has built in",
            )
        if key not in RunConfig.model_fields:
            usual = SETTING_ALIASES.get(key.lower())
            near = [usual] if usual else difflib.get_close_matches(key, RunConfig.model_fields, n=1, cutoff=0.6)
            fix = f"did you mean '{near[0]}'?" if near else "see 'lorafit train --help' for the settings"
            raise UsageError(f"unknown setting '{key}' in {name}", fix=fix)


def _validated(values: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else where
        given = first.get("input")
        field = RunConfig.model_fields.get(key)
        fix = f"{key} is: {field.description}" if field else "see 'lorafit train --help'"
        raise UsageError(
            f"{given!r} does not fit: {first['msg'].lower().removeprefix('value error, ')}", where=key, fix=fix
        ) from error
