"""settings: resolve keyword arguments, a recipe, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafit.config import Resolved, RunConfig, base_folder, load_recipe, resolve
from lorafit.config.setting_aliases import our_name
from lorafit.data import Template, TextTokenizer, token_ids
from lorafit.data.new_tokens.grown_settings import with_new_tokens
from lorafit.errors import UsageError
from lorafit.plugins import OBJECTIVES, plugin_names
from lorafit.runs import RunDir, with_initial_adapter
from lorafit.runs.lookup import find_target

RECIPE_SUFFIXES = (".yaml", ".yml")
BUILT_IN_OBJECTIVE = str(RunConfig.model_fields["objective"].default)


def settle(data: Sequence[str | Path] | str | Path | None, settings: dict[str, Any]) -> Resolved:
    """Resolve `data` (files, or one recipe YAML) and `settings`.

    Relative data paths in a recipe are relative to the recipe's folder.
    """
    sources = [data] if isinstance(data, str | Path) else () if data is None else data
    if not isinstance(sources, list | tuple) or not all(isinstance(source, str | Path) for source in sources):
        raise UsageError(
            f"data of type {type(data).__name__} cannot be read",
            where="data",
            fix="pass paths of data files or of a recipe",
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
        flags = _absolute({**settings, **({"data": tuple(names)} if names else {})})
        return _completed(resolve(flags=flags))
    if len(names) > 1:
        raise UsageError("a recipe takes no other data files", where=recipes[0], fix="use --set data=FILE")
    path = Path(recipes[0])
    named = _absolute(_beside(load_recipe(path), path.parent))
    return _completed(resolve(named, _absolute(settings)))


def _completed(resolved: Resolved) -> Resolved:
    """Return the settings with those of an initial adapter and of new tokens. Raises UsageError."""
    chosen = resolved.config.objective
    if chosen != BUILT_IN_OBJECTIVE and chosen not in (plugins := plugin_names(OBJECTIVES)):
        known = (BUILT_IN_OBJECTIVE, *plugins)
        what = f"'{chosen:.40}' is neither built in nor a plug-in of an installed package"
        fix = f"choose {' or '.join(known)}, or install the package that brings it"
        raise UsageError(what, where="objective", fix=fix)
    if resolved.config.init_adapter is not None:
        resolved = with_initial_adapter(resolved)
    return with_new_tokens(resolved) if resolved.config.new_tokens else resolved


def _refuse_other_data(names: list[str], also: Any) -> None:
    others = [also] if isinstance(also, str | Path) else list(also or ())
    if names and others and names != [str(other) for other in others]:
        raise UsageError(
            f"the data are {', '.join(names)}, but the setting data names others", where="data", fix="name them once"
        )


def _beside(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the recipe with paths relative to its folder made usable from here.

    Only data and base paths that exist beside the recipe change; they win over the same names here.
    """

    def seen(name: Any) -> Any:
        if isinstance(name, dict) and "path" in name:
            return {**name, "path": seen(name["path"])}
        path = folder / str(name)
        return str(path) if isinstance(name, str) and name and path.exists() else name

    placed = dict(recipe)
    for key, value in recipe.items():
        if our_name(key, RunConfig.model_fields) in ("base", "data", "template", "init_adapter"):
            placed[key] = [seen(name) for name in value] if isinstance(value, list) else seen(value)
    return placed


def _in_words(value: Any) -> Any:
    """Return a path as text, and any other value unchanged."""
    if isinstance(value, list | tuple):
        return type(value)(map(_in_words, value))
    return str(value) if isinstance(value, Path) else value


def _absolute(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with existing paths made absolute.

    A run directory is then valid from any folder.
    """

    def placed(name: Any) -> Any:
        return str(Path(name).expanduser().absolute()) if isinstance(name, str) and Path(name).exists() else name

    absolute = dict(settings)
    for key, value in settings.items():
        if our_name(key, RunConfig.model_fields) in ("base", "data", "holdout", "template", "init_adapter"):
            absolute[key] = type(value)(map(placed, value)) if isinstance(value, list | tuple) else placed(value)
    return absolute


def template_for(resolved: Resolved) -> Template:
    """Return the template of the run: the named file, the base's own, or the fallback."""
    config = resolved.config
    tokenizer = TextTokenizer.from_base(config.base, config.revision)
    token_ids(config, tokenizer)  # raises for texts that are none
    return Template.for_tokenizer(tokenizer, config.template)


def require_startable(
    data: Sequence[str | Path] | str | Path | None, settings: dict[str, Any], *, restart: bool
) -> None:
    """Raise the errors of settings, base and a taken `out` folder, before torch is imported."""
    resolved = settle(data, settings)
    require_data(resolved)
    require_base(resolved)
    base_folder(resolved.config.base, resolved.config.revision)
    find_target(resolved, restart=restart)


def require_data(resolved: Resolved) -> None:
    """Raise UsageError if no data are named."""
    if not resolved.config.data:
        raise UsageError("no data are named", fix="pass a JSONL file, a folder, or a recipe with data in it")


def require_base(resolved: Resolved) -> None:
    """Raise UsageError if no base is named."""
    if not resolved.config.base:
        raise UsageError("no base model is named", fix="pass --base with a local folder or a hub id")
