"""JSON and YAML that somebody else wrote: read with limits on size and depth, here and nowhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from lorafit.errors import LorafitError, UsageError

MAX_JSON_BYTES = 4 << 20
"""Far more than any configuration takes; callers allow more for what is long by nature (a weight index)."""
MAX_YAML_BYTES = 1 << 20
"""A recipe is a page, but a run may name thousands of data files."""
MAX_DEPTH = 32
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there


def read_json(
    path: Path, error: type[LorafitError], *, max_bytes: int = MAX_JSON_BYTES, fix: str | None = None
) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises `error`, in one sentence, for anything else."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)  # not the size that stat gives: a pipe has none
    except OSError as problem:
        raise error(f"cannot be read ({problem.strerror})", where=str(path), fix=fix) from problem
    if len(raw) > max_bytes:
        raise error(f"is larger than {max_bytes >> 20} MiB", where=str(path), fix=fix)
    return parse_json(raw, str(path), error, fix=fix)


def parse_json(raw: bytes, where: str, error: type[LorafitError], *, fix: str | None = None) -> dict[str, Any]:
    """The JSON object in `raw`, whose size the caller has limited. Raises `error` for anything else."""
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except RecursionError as problem:
        raise error(f"nests deeper than {MAX_DEPTH} levels", where=where, fix=fix) from problem
    except UnicodeDecodeError as problem:
        raise error("is not UTF-8", where=where, fix=fix) from problem
    except ValueError as problem:
        raise error("is not valid JSON", where=where, fix=fix) from problem
    if not isinstance(content, dict):
        raise error("is not a JSON object", where=where, fix=fix)
    if _is_deep(content):
        raise error(f"nests deeper than {MAX_DEPTH} levels", where=where, fix=fix)
    return content


def read_recipe(path: Path) -> Any:
    """What the YAML file at `path` holds. Raises UsageError, naming the line, for what is no plain YAML."""
    fix = "a recipe is a short YAML of settings"
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_YAML_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the recipe ({error.strerror})", where=str(path), fix="check the path") from error
    except UnicodeDecodeError as error:
        raise UsageError("the recipe is not UTF-8", where=str(path), fix="save it as UTF-8") from error
    if len(raw) > MAX_YAML_BYTES:
        raise UsageError(f"the recipe is larger than {MAX_YAML_BYTES >> 20} MiB", where=str(path), fix=fix)
    try:
        return parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise UsageError(f"the recipe is not valid YAML ({error.problem})", where=place, fix="mend it there") from error
    except yaml.YAMLError as error:
        raise UsageError("the recipe is not valid YAML", where=str(path), fix="mend the syntax") from error


def parse_yaml(text: str) -> Any:
    """What `text` holds: plain scalars, lists and mappings. Raises yaml.YAMLError.

    Refused besides what yaml.safe_load refuses: aliases, by which a short file grows without end (the "billion
    laughs"), a key that stands twice, and more than MAX_DEPTH levels.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):  # flat, whatever the text nests
        mark: Any = event.start_mark
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=mark)
        if depth > MAX_DEPTH:
            problem = f"it nests deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
    return yaml.load(text, Loader=_PlainLoader)


class _PlainLoader(_LOADER):  # type: ignore[misc]
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _is_deep(content: Any) -> bool:
    level = [content]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for part in level
            for inner in (part.values() if isinstance(part, dict) else part)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
