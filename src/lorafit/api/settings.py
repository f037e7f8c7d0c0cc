"""Settings as callers give them: keyword arguments, a recipe, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafit.config import Resolved, RunConfig, base_folder, load_recipe, resolve
from lorafit.config.setting_aliases import our_name
from lorafit.data import Template, TextTokenizer
from lorafit.errors import UsageError
from lorafit.runs import RunDir
from lorafit.runs.lookup import find_target

RECIPE_SUFFIXES = (".yaml", ".yml")


def settle(data: Sequence[str | Path] | str | Path | None, settings: dict[str, Any]) -> Resolved:
    """Resolve `data` (files, or one recipe YAML) and `settings`; relative data paths in a recipe stand beside it."""
    sources = [data] if isinstance(data, str | Path) else () if data is None else data
    if not isinstance(sources, list | tuple) or not all(isinstance(source, str | Path) for source in sources):
        raise UsageError(
            f"{type(data).__name__} is no data that can be read", where="data", fix="pass paths of files, or a recipe's"
        )
    names = [str(source) for source in sources]
    settings = {key: _in_words(value) for key, value in settings.items()}
    for name in names:
        if RunDir(Path(name)).settings.is_file():
            recipe = RunDir(Path(name)).settings
            raise UsageError("this is a run directory, not data", where=name, fix=f"its recipe is {recipe}")
    recipes = [name for name in names if name.endswith(RECIPE_SUFFIXES)]
    if not recipes:
        _refuse_other_data(names, settings.get("data"))
        return resolve(flags=_absolute({**settings, **({"data": tuple(names)} if names else {})}))
    if len(names) > 1:
        raise UsageError("a recipe stands alone: its data are named in it", where=recipes[0], fix="use --set data=FILE")
    path = Path(recipes[0])
    return resolve(_absolute(_beside(load_recipe(path), path.parent)), _absolute(settings))


def _refuse_other_data(names: list[str], also: Any) -> None:
    others = [also] if isinstance(also, str | Path) else list(also or ())
    if names and others and names != [str(other) for other in others]:
        raise UsageError(
            f"the data are {', '.join(names)}, and the setting data says otherwise", where="data", fix="name them once"
        )


def _beside(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Data and base paths that exist beside the recipe, as seen from here; they win over the same names here."""

    def seen(name: Any) -> Any:
        if isinstance(name, dict) and "path" in name:
            return {**name, "path": seen(name["path"])}
        near = folder / str(name)
        return str(near) if isinstance(name, str) and name and near.exists() else name

    placed = dict(recipe)
    for key, value in recipe.items():
        if our_name(key, RunConfig.model_fields) in ("base", "data", "template"):
            placed[key] = [seen(name) for name in value] if isinstance(value, list) else seen(value)
    return placed


def _in_words(value: Any) -> Any:
    """A path as the text that settings are written in; anything else as it is."""
    if isinstance(value, list | tuple):
        return type(value)(map(_in_words, value))
    return str(value) if isinstance(value, Path) else value


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Paths that exist as absolute ones, so that a run directory is understood from any folder."""

    def placed(name: Any) -> Any:
        return str(Path(name).expanduser().absolute()) if isinstance(name, str) and Path(name).exists() else name

    there = dict(settings)
    for key, value in settings.items():
        if our_name(key, RunConfig.model_fields) in ("base", "data", "holdout", "template"):
            there[key] = type(value)(map(placed, value)) if isinstance(value, list | tuple) else placed(value)
    return there


def template_for(resolved: Resolved) -> Template:
    """The template that renders this run's rows: the named file, the base's own, or the fallback."""
    config = resolved.config
    return Template.for_tokenizer(TextTokenizer.from_base(config.base, config.revision), config.template)


def preflight(
    data: Sequence[str | Path] | str | Path | None, settings: dict[str, Any], *, restart: bool = False
) -> None:
    """Raise at once, before torch is imported, for what needs no data read: settings, base, a taken --out."""
    resolved = settle(data, settings)
    require_data(resolved)
    require_base(resolved)
    base_folder(resolved.config.base, resolved.config.revision)
    find_target(resolved, restart=restart)


def require_data(resolved: Resolved) -> None:
    """UsageError unless data were named."""
    if not resolved.config.data:
        raise UsageError("no data were named", fix="pass a JSONL file, a folder, or a recipe with data in it")


def require_base(resolved: Resolved) -> None:
    """UsageError unless a base was named."""
    if not resolved.config.base:
        raise UsageError("no base model was named", fix="pass --base with a local folder or a hub id")
