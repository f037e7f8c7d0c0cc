"""plugins: objectives and export formats of other installed packages, found by their entry points. No torch."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from lorafit.errors import UsageError

OBJECTIVES = "lorafit.objectives"
EXPORT_FORMATS = "lorafit.export_formats"


def plugin_names(group: str) -> tuple[str, ...]:
    """Return the names that installed packages give to their plug-ins of `group`, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=group)}))


def load_plugin(group: str, name: str, protocol: type) -> Any:
    """Return the class that the plug-in `name` of `group` names.

    Raises UsageError if no package or several have it, if its import fails, or if it lacks functions of `protocol`.
    """
    entry = _entry(group, name)
    try:
        loaded = entry.load()
    except Exception as error:  # a foreign module may raise anything while it is imported
        what = f"the plug-in '{name}' of {_release(entry)} cannot be loaded: {type(error).__name__}: {error}"
        fix = f"mend it until 'python -c \"import {entry.module}\"' works"
        raise UsageError(what, where=entry.value, fix=fix) from error
    wanted = (key for key, value in vars(protocol).items() if callable(value) or isinstance(value, property))
    missing = [key for key in wanted if not key.startswith("_") and not hasattr(loaded, key)]
    if not isinstance(loaded, type) or missing:
        lacks = f"lacks {', '.join(missing)} of lorafit's {protocol.__name__}" if missing else "is no class"
        what = f"the plug-in '{name}' of {_release(entry)} {lacks}"
        raise UsageError(what, where=entry.value, fix="follow docs/extending.md")
    return loaded


def plugin_release(group: str, name: str) -> str:
    """Return the package that brings the plug-in, with its version."""
    return _release(_entry(group, name))


def _entry(group: str, name: str) -> EntryPoint:
    found = {entry.value: entry for entry in entry_points(group=group, name=name)}
    if not found:
        what = f"no installed package has the plug-in '{name:.40}'"
        raise UsageError(what, where=group, fix="install the package that brings it")
    if len(found) > 1:
        packages = " and ".join(sorted(_release(entry) for entry in found.values()))
        raise UsageError(f"several packages have a plug-in '{name}': {packages}", where=group, fix="uninstall one")
    return next(iter(found.values()))


def _release(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module
