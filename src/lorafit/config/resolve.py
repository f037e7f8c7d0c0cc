"""Where each setting came from: default < recipe < flag, and the plan for what nobody set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lorafit.config.foreign_text import parse_yaml, read_recipe
from lorafit.config.run_config import PLANNED, TEXTS, RunConfig
from lorafit.config.setting_aliases import CODE, Translated, translate
from lorafit.errors import UsageError


class _SeveralProblems(UsageError):
    """Several settings that cannot be used, a line each."""

    @property
    def sentence(self) -> str:
        return f"{self.what}\n{self.fix}"


class Source(StrEnum):
    """Who set a value."""

    DEFAULT = "default"
    RECIPE = "recipe"
    FLAG = "flag"
    PLAN = "plan"
    RUN = "run"


@dataclass(frozen=True)
class Resolved:
    """The settings of a run and, for each, who set it.

    Attributes:
        config: every setting.
        sources: setting -> who set it.
        names: setting -> the name it was given under, where that is another.
    """

    config: RunConfig
    sources: Mapping[str, Source]
    names: Mapping[str, str] = field(default_factory=dict)

    def is_set(self, key: str) -> bool:
        """True when a recipe, a flag or the run going on set `key` to more than "auto": the plan leaves it alone."""
        return self.sources[key] in (Source.RECIPE, Source.FLAG, Source.RUN) and getattr(self.config, key) != "auto"

    def resuming(self, run: RunConfig, keys: Iterable[str]) -> Resolved:
        """The same settings with `run`'s values for those of `keys` that nobody set: they were planned back then."""
        values = {key: getattr(run, key) for key in keys if not self.is_set(key)}
        config = self.config.model_copy(update=values)
        return Resolved(config, {**self.sources, **dict.fromkeys(values, Source.RUN)}, self._names_but(values))

    def planned(self, values: Mapping[str, Any]) -> Resolved:
        """The same settings with the plan's `values` for the keys in PLANNED that nobody set."""
        unknown = set(values) - set(PLANNED)
        assert not unknown, f"the plan may not decide {sorted(unknown)}"
        fresh = {key: value for key, value in values.items() if not self.is_set(key)}
        config = _validated({**self.config.model_dump(), **fresh}, "plan")
        return Resolved(config, {**self.sources, **dict.fromkeys(fresh, Source.PLAN)}, self._names_but(fresh))

    def table(self) -> list[tuple[str, Any, str]]:
        """(key, value, source) of every setting, in the order of RunConfig."""
        return [(key, getattr(self.config, key), self.sources[key].value) for key in type(self.config).model_fields]

    def _names_but(self, replaced: Iterable[str]) -> dict[str, str]:
        return {key: name for key, name in self.names.items() if key not in set(replaced)}


def resolve(recipe: Mapping[str, Any] | None = None, flags: Mapping[str, Any] | None = None) -> Resolved:
    """Settle every setting: flags over the recipe over the defaults; None among flags means 'not given'.

    Names that other tools use are translated. Raises one UsageError for all unknown keys and all values that do not
    fit. When a rank is set without an alpha, alpha follows it at alpha / rank = 2.
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
        values["alpha"] = 2 * RunConfig(rank=values["rank"]).rank
        sources["alpha"] = sources["rank"]
    return Resolved(_validated(values, "settings"), sources, names)


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
    """UsageError for the keys of `values` that are no settings; `name` says where they stand."""
    if problems := _unknown(translate(values, RunConfig.model_fields), name):
        raise _joined(problems)


def _unknown(translated: Translated, name: str) -> list[UsageError]:
    problems = []
    for key, advice in translated.problems.items():
        if key == CODE:
            what = f"lorafit never runs Python code out of a base's folder ({CODE})"
        else:
            what = f"'{key}' in {name}" if advice.startswith("it says") else f"unknown setting '{key}' in {name}"
        problems.append(UsageError(what, fix=advice))
    return problems


def _joined(problems: Sequence[UsageError]) -> UsageError:
    """One error for all of `problems`, a line each where they are several."""
    if len(problems) == 1:
        return problems[0]
    lines = (_in_a_list(problem) for problem in problems)
    what = f"{len(problems)} settings cannot be used:\n  " + "\n  ".join(lines)
    return _SeveralProblems(what, fix="list all settings with 'lorafit settings'")


def _in_a_list(problem: UsageError) -> str:
    """The problem without the words that all of them share."""
    name, _, _ = problem.what.removeprefix("unknown setting ").partition(" in ")
    return problem.sentence if problem.where else f"{name.strip(chr(39))}: {problem.fix}"


def _misfits(values: Mapping[str, Any]) -> list[UsageError]:
    """An error for each value that does not fit."""
    try:
        RunConfig(**values)
    except ValidationError as error:
        return [_misfit(one, "settings") for one in _one_a_key(error)]
    except UsageError as error:
        return [error]
    return []


def _one_a_key(error: ValidationError) -> list[Any]:
    # a union reports one error for each of its kinds
    return list({str(one["loc"][:1]): one for one in reversed(error.errors())}.values())[::-1]


def _misfit(error: Any, where: str) -> UsageError:
    key = str(error["loc"][0]) if error["loc"] else where
    field = RunConfig.model_fields.get(key)
    fix = f"{key} is: {field.description}" if field else "see 'lorafit settings'"
    said = str(error["msg"]).lower().removeprefix("value error, ")
    return UsageError(f"{error.get('input')!r} does not fit: {said}", where=key, fix=fix)


def _validated(values: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig(**values)
    except ValidationError as error:
        raise _misfit(error.errors()[0], where) from error
