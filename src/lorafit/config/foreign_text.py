"""Foreign text: sizes, JSON and YAML from users, read with limits on size and depth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from lorafit.errors import LorafitError, UsageError

_UNITS = {"": 1} | {unit + binary: 2**power for binary in ("", "i") for unit, power in zip("kmgt", (10, 20, 30, 40))}
_MOST = 1e18
_LEAST_BARE = 2**20  # a small number without a unit, such as 8, means GiB and not bytes


def parse_bytes(text: str, where: str = "size") -> int:
    """Return the bytes in `text`.

    `GB` is 2**30 as `GiB` is, because a GPU sold with 8 GB has 8 GiB. Raises UsageError for any other text, and for a
    small number without a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] == "i" or not 0 < float(match[1]) <= _MOST:
        raise UsageError(f"'{text[:40]}' is not a size", where=where, fix="write it like 8GiB, 24GB or 80GiB")
    size = int(float(match[1]) * _UNITS[match[2]])
    if not match[2] and size < _LEAST_BARE:
        raise UsageError(f"'{text}' has no unit", where=where, fix=f"write it like {match[1]}GiB")
    return size


UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
TINY = 1e-6
"""Share of a tenth that rounding ignores. `6.2GiB` truncated to whole bytes stays 6.2."""


def size_in_words(size_bytes: float, rounding: Callable[[float], int] = round) -> str:
    """Return bytes as text, such as `5.9 GiB` or `1.0 KiB`.

    Use `at_least` for a need and `at_most` for a limit. A sentence then never compares two equal numbers.
    """
    unit, size = next(((unit, size) for unit, size in UNITS if size_bytes >= size), ("B", 1))
    if unit == "B":
        return f"{size_bytes:.0f} B"
    return f"{rounding(10 * size_bytes / size) / 10:,.1f} {unit}"


def at_least(size_bytes: float) -> str:
    """Return the size as text, rounded up."""
    return size_in_words(size_bytes, lambda tenths: math.ceil(tenths - TINY))


def at_most(size_bytes: float) -> str:
    """Return the size as text, rounded down."""
    return size_in_words(size_bytes, lambda tenths: math.floor(tenths + TINY))


MAX_JSON_BYTES = 4 << 20
"""Largest JSON file, far beyond any configuration. Callers allow more for a weight index."""
MAX_YAML_BYTES = 1 << 20
"""Largest recipe. Most are a page long, but a run may list thousands of data files."""
MAX_DEPTH = 32
_STRING = "tag:yaml.org,2002:str"
_MISREAD = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool"))


def one_line(problem: BaseException | str, limit: int = 200) -> str:
    """Return the message of a `problem` from another library, as one printable line of at most `limit` characters.

    An OSError is told in the system's words, and an error without words by its kind.
    """
    text = problem if isinstance(problem, str) else getattr(problem, "strerror", None) or str(problem)
    words = " ".join(str(text)[: 16 * limit].split()) or type(problem).__name__
    shown = "".join(char if char.isprintable() else "�" for char in words[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def read_json(
    path: Path, error: type[LorafitError], *, max_bytes: int = MAX_JSON_BYTES, fix: str | None = None
) -> dict[str, Any]:
    """Return the JSON object in the file at `path`. Raises `error` for any other content."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)  # stat gives no size for a pipe
    except OSError as problem:
        raise error(f"the file cannot be read ({problem.strerror})", where=str(path), fix=fix) from problem
    if len(raw) > max_bytes:
        raise error(f"the file is larger than {max_bytes >> 20} MiB", where=str(path), fix=fix)
    return parse_json(raw, str(path), error, fix=fix)


def parse_json(raw: bytes, where: str, error: type[LorafitError], *, fix: str | None = None) -> dict[str, Any]:
    """Return the JSON object in `raw`. Raises `error` for any other content.

    The caller limits the size.
    """
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except RecursionError as problem:
        raise error(f"the JSON nests deeper than {MAX_DEPTH} levels", where=where, fix=fix) from problem
    except UnicodeDecodeError as problem:
        raise error("the text is not UTF-8", where=where, fix=fix) from problem
    except ValueError as problem:
        raise error("the text is not valid JSON", where=where, fix=fix) from problem
    if not isinstance(content, dict):
        raise error("the text is not a JSON object", where=where, fix=fix)
    if nests_deeper(content, MAX_DEPTH):
        raise error(f"the JSON nests deeper than {MAX_DEPTH} levels", where=where, fix=fix)
    return content


def read_recipe(path: Path, texts: Collection[str] = ()) -> Any:
    """Return the content of the YAML file at `path`.

    The values of `texts` stay text. Raises UsageError with the line for a file that is not plain YAML.
    """
    fix = "write a short YAML file of settings"
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
        return parse_yaml(text, texts)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark is not None else str(path)
        what = f"the recipe is not valid YAML ({error.problem})"
        raise UsageError(what, where=where, fix="correct this line") from error
    except yaml.YAMLError as error:
        raise UsageError("the recipe is not valid YAML", where=str(path), fix="correct the syntax") from error


def parse_yaml(text: str, texts: Collection[str] = ()) -> Any:
    """Return the content of YAML `text`, with dates and base-60 numbers as text.

    The keys in `texts` keep numbers and booleans as text too. Raises yaml.YAMLError for invalid YAML and for a
    duplicate key.
    """
    loader = _PlainLoader(text)
    try:
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode):
            for key, value in root.value:
                if isinstance(key, yaml.ScalarNode) and key.value in texts:
                    _keep_text(value)
        return None if root is None else loader.construct_document(root)
    except RecursionError as error:
        raise yaml.MarkedYAMLError(problem="it nests too deeply", problem_mark=loader.get_mark()) from error
    finally:
        loader.dispose()


def _keep_text(node: Any) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag in _MISREAD:
        node.tag = _STRING
    for part in node.value if isinstance(node, yaml.CollectionNode) else ():
        _keep_text(part[1] if isinstance(node, yaml.MappingNode) else part)


class _PlainLoader(yaml.SafeLoader):  # libyaml's loader overflows the stack of a deeply nested file
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"duplicate key '{key.value}'", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        if ":" in node.value:
            return node.value  # YAML 1.1 reads '1:30' as a number in base 60
        is_whole = node.tag.endswith(":int")
        try:
            number = self.construct_yaml_int(node) if is_whole else self.construct_yaml_float(node)
            float(number)
        except (ValueError, OverflowError) as error:
            raise yaml.MarkedYAMLError(problem="not a number", problem_mark=node.start_mark) from error
        return number


# without timestamps, so that a name such as '2026-13-45' is not read as an invalid date
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if not tag.endswith(":timestamp")]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("int", "float"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.construct_number)


def nests_deeper(content: Any, levels: int) -> bool:
    """Return True if lists and mappings of `content` lie more than `levels` deep; no recursion."""
    level = [content]
    for _ in range(levels):
        level = [
            inner
            for part in level
            for inner in (part.values() if isinstance(part, dict) else part)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
