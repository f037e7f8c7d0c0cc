"""Where each setting came from: default < recipe < flag, and the plan for what nobody set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafit.config.run_config import PLANNED, RunConfig
from lorafit.errors import UsageError

MAX_RECIPE_BYTES = 1 << 20


class Source(StrEnum):
    """Who set a value."""

    DEFAULT = "default"
    RECIPE = "recipe"
    FLAG = "flag"
    PLAN = "plan"


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and, for each, who set it."""

    config: RunConfig
    sources: Mapping[str, Source]

    def is_set(self, key: str) -> bool:
        """True when a recipe or a flag set `key` to more than "auto", so that the plan must leave it alone."""
        return self.sources[key] in (Source.RECIPE, Source.FLAG) and getattr(self.config, key) != "auto"

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
        _reject_unknown(values, name)
    sources = dict.fromkeys(RunConfig.model_fields, Source.DEFAULT)
    sources |= dict.fromkeys(recipe, Source.RECIPE) | dict.fromkeys(flags, Source.FLAG)
    values = {**recipe, **flags}
    if "rank" in values and "alpha" not in values:
        values["alpha"] = 2 * _validated({"rank": values["rank"]}, "rank").rank
        sources["alpha"] = sources["rank"]
    return Resolved(_validated(values, "settings"), sources)


def load_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe YAML; paths in it stay as written. Raises UsageError when it is no recipe."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UsageError(
                "the recipe is larger than 1 MiB", where=str(path), fix="a recipe is a short YAML of settings"
            )
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the recipe ({error.strerror})", where=str(path), fix="check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        place = f"{path}:{line + 1}" if line is not None else str(path)
        raise UsageError("the recipe is not valid YAML", where=place, fix="mend the syntax there") from error
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UsageError("a recipe is a mapping of settings", where=str(path), fix="write lines like 'rank: 16'")
    return loaded


def parse_assignments(assignments: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """`key=value` pairs as `flag` takes them; values are read as YAML scalars or lists."""
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"'{assignment}' is not key=value", where=flag, fix=f"write it like {flag} KEY=VALUE")
        try:
            values[key.strip()] = _number(yaml.safe_load(text)) if text else ""
        except yaml.YAMLError as error:
            raise UsageError(f"'{text}' is not a value", where=f"{flag} {key}", fix="quote it for the shell") from error
    return values


def _number(value: Any) -> Any:
    # YAML 1.1 reads '2e-4' as text (it wants 2.0e-4); everyone who types a learning rate means the number
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _reject_unknown(values: Mapping[str, Any], name: str) -> None:
    for key in values:
        if key not in RunConfig.model_fields:
            near = difflib.get_close_matches(key, RunConfig.model_fields, n=1, cutoff=0.5)
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
        raise UsageError(f"{given!r} does not fit: {first['msg'].lower()}", where=key, fix=fix) from error
