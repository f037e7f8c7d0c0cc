"""Resolve: the value and source of each setting: default < recipe < flag.

The plan decides settings that neither recipe nor flag sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafit.config.foreign_text import parse_yaml, read_recipe
from lorafit.config.run_config import PLANNED, TEXTS, RunConfig, scale_divisor
from lorafit.config.setting_aliases import CODE, CONFLICT, Translated, translate
from lorafit.errors import UsageError


class _SeveralProblems(UsageError):
    """Several invalid settings, one a line."""

    @property
    def sentence(self) -> str:
        return f"{self.what}\n{self.fix}"


class Source(StrEnum):
    """Source of a value."""

    DEFAULT = "default"
    RECIPE = "recipe"
    FLAG = "flag"
    PLAN = "plan"
    RUN = "run"


@dataclass(frozen=True)
class Resolved:
    """Hold the settings of a run and the source of each.

    Attributes:
        config: Every setting.
        sources: Setting -> its source.
        names: Setting -> the alias that set it, for settings set by an alias.
    """

    config: RunConfig
    sources: Mapping[str, Source]
    names: Mapping[str, str] = field(default_factory=dict)

    def is_set(self, key: str) -> bool:
        """Return True when a recipe, a flag or the resumed run set `key`.

        The plan does not decide such a setting. The value "auto" counts as not set.
        """
        return self.sources[key] in (Source.RECIPE, Source.FLAG, Source.RUN) and getattr(self.config, key) != "auto"

    def resuming(self, run: RunConfig, keys: Iterable[str]) -> Resolved:
        """Return the settings with the resumed `run`'s values for those of `keys` that nobody set.

        These values were planned when the run started.
        """
        values = {key: getattr(run, key) for key in keys if not self.is_set(key)}
        config = self.config.model_copy(update=values)
        return Resolved(config, {**self.sources, **dict.fromkeys(values, Source.RUN)}, self._names_but(values))

    def planned(self, values: Mapping[str, Any]) -> Resolved:
        """Return the settings with the plan's `values` for the keys in PLANNED that nobody set."""
        unknown = set(values) - set(PLANNED)
        assert not unknown, f"the plan may not decide {sorted(unknown)}"
        fresh = {key: value for key, value in values.items() if not self.is_set(key)}
        config = _validated({**self.config.model_dump(), **fresh}, "plan")
        return Resolved(config, {**self.sources, **dict.fromkeys(fresh, Source.PLAN)}, self._names_but(fresh))

    def table(self) -> list[tuple[str, Any, str]]:
        """Return (key, value, source) of every setting, in the order of RunConfig."""
        return [(key, getattr(self.config, key), self.sources[key].value) for key in type(self.config).model_fields]

    def _names_but(self, replaced: Iterable[str]) -> dict[str, str]:
        return {key: name for key, name in self.names.items() if key not in set(replaced)}


def resolve(recipe: Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None) -> Resolved:
    """Return every setting with its source: flags override the recipe, the recipe overrides the defaults.

    None among flags means 'not given'. Setting aliases are translated. A rank without an alpha sets alpha to twice the
    rank. Raises one UsageError for all unknown keys and all invalid values.
    """
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    from_recipe, from_flags = (translate(values, RunConfig.model_fields) for values in (recipe or {}, given))
    sources = dict.fromkeys(RunConfig.model_fields, Source.DEFAULT)
    sources |= dict.fromkeys(from_recipe.values, Source.RECIPE) | dict.fromkeys(from_flags.values, Source.FLAG)
    names = {key: name for key, name in from_recipe.names.items() if key not in from_flags.values} | from_flags.names
    values = {**from_recipe.values, **from_flags.values}
    problems = [*_unknown(from_recipe, "the recipe"), *_unknown(from_flags, "flags")]
    misfits = _misfits(values)
    if problems or misfits:
        raise _joined([*problems, *misfits])
    if "rank" in values and "alpha" not in values:
        values["alpha"] = usual_alpha(RunConfig(rank=values["rank"], rslora=values.get("rslora", False)))
        sources["alpha"] = sources["rank"]
    return Resolved(_validated(values, "settings"), sources, names)


def load_recipe(path: Path) -> dict[str, Any]:
    """Return the mapping in a recipe YAML, with paths as written. Raises UsageError for any other file."""
    loaded = read_recipe(path, TEXTS)
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UsageError("the recipe is not a mapping of settings", where=str(path), fix="write lines like 'rank: 16'")
    return loaded


def parse_assignments(assignments: Sequence[str], flag: str = "--set") -> dict[str, Any]:
    """Return the `key=value` pairs of `flag`.

    Values are YAML scalars or lists; those of TEXTS stay text. Raises UsageError for any other form.
    """
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
            what = f"'{key.strip()}' is set to {values[key.strip()]} and to {value}"
            raise UsageError(what, where=flag, fix="set it once")
    return values


def _text(text: str) -> Any:
    # '*.jsonl', '007' and '2026-01-01' stay text; quotes and brackets are YAML's
    if text[:1] in ("[", "{", "'", '"') and text:
        return parse_yaml(text)
    return None if text in ("null", "~") else text


def _number(value: Any) -> Any:
    # YAML 1.1 reads '2e-4' as text because it lacks the dot of 2.0e-4, but a learning rate is a number
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def reject_unknown(values: Mapping[str, Any], name: str) -> None:
    """Raise UsageError for keys of `values` that are not settings. `name` is their origin."""
    if problems := _unknown(translate(values, RunConfig.model_fields), name):
        raise _joined(problems)


def _unknown(translated: Translated, name: str) -> list[UsageError]:
    problems = []
    for key, advice in translated.problems.items():
        if key == CODE:
            what = f"lorafit never runs Python code from a base's folder ({CODE})"
        else:
            what = f"'{key}' in {name}" if advice.startswith(CONFLICT) else f"unknown setting '{key}' in {name}"
        problems.append(UsageError(what, fix=advice))
    return problems


def _joined(problems: Sequence[UsageError]) -> UsageError:
    """Return one error for all of `problems`, with a line for each of several."""
    if len(problems) == 1:
        return problems[0]
    lines = (_in_a_list(problem) for problem in problems)
    what = f"{len(problems)} settings are invalid:\n  " + "\n  ".join(lines)
    return _SeveralProblems(what, fix="list all settings with 'lorafit settings'")


def _in_a_list(problem: UsageError) -> str:
    """Return the problem without the words that all problems of a list share."""
    name, _, _ = problem.what.removeprefix("unknown setting ").partition(" in ")
    return problem.sentence if problem.where else f"{name.strip(chr(39))}: {problem.fix}"


def _misfits(values: Mapping[str, Any]) -> list[UsageError]:
    """Return an error for each invalid value."""
    try:
        RunConfig(**values)
    except ValidationError as error:
        return [_misfit(one, "settings") for one in _one_a_key(error)]
    except UsageError as error:
        return [error]
    return []


def _one_a_key(error: ValidationError) -> list[Any]:
    # pydantic reports one error for each member of a union
    return list({str(one["loc"][:1]): one for one in reversed(error.errors())}.values())[::-1]


def _misfit(error: Any, where: str) -> UsageError:
    key = str(error["loc"][0]) if error["loc"] else where
    field = RunConfig.model_fields.get(key)
    fix = f"{key} is: {field.description}" if field else "see 'lorafit settings'"
    if error["type"] == "literal_error":
        choices = str(error["ctx"]["expected"]).replace("'", "")
        what = f"{error.get('input')!r} is not one of its values; choose {choices}"
        return UsageError(what, where=key, fix=f"see 'lorafit settings {key}'")
    reason = str(error["msg"]).lower().removeprefix("value error, ").partition(", unable to parse")[0]
    return UsageError(f"{error.get('input')!r} is invalid: {reason}", where=key, fix=fix)


def _validated(values: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise _misfit(error.errors()[0], where) from error


def usual_alpha(config: RunConfig) -> float:
    """Return the alpha that scales the delta of `config` by 2."""
    return 2.0 * scale_divisor(config.rank, rslora=config.rslora)
