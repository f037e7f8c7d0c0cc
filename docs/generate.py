"""Make docs/reference/cli.md, families.md and settings.md from the code and its data.

python docs/generate.py            # write the pages
python docs/generate.py --check    # exit 1 when a page is stale
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from lorafit.cli.app import app
from lorafit.config import RunConfig
from lorafit.config.setting_reference import describe_setting
from lorafit.shapes.tried_families import tried_families

REFERENCE = Path(__file__).parent / "reference"
MADE = "<!-- made by docs/generate.py; edit the code, then run it -->"
EXIT_CODES = """## Exit codes
| code | meaning |
|---|---|
| 0 | done; findings were warnings or notes at most |
| 1 | an error finding, a run that cannot start or finish, or a merge that failed its verification |
| 2 | wrong usage: an unknown flag, an unknown setting, a value that does not fit |
| 3 | of `export --verify-in vllm`: written, and not proved in vLLM, which is not installed or does not start |
| 70 | an error inside lorafit; add `--debug` for the traceback |
| 130, 143 | stopped by Ctrl-C or SIGTERM; the same command resumes the run |
"""


def cli_page() -> str:
    """Return the page of commands, one section each, in the order in which one uses them."""
    group: Any = typer.main.get_command(app)
    sections = [_command_section(name, command) for name, command in group.commands.items() if not command.hidden]
    opening = (
        "Every command takes `--json`, and then prints one object, for an error too. "
        "`--debug` shows the traceback of an error."
    )
    return "\n".join([MADE, "# Commands", "", opening, "", *sections, EXIT_CODES])


def _command_section(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    words = [_argument_word(argument) for argument in arguments]
    lines = [f"## lorafit {name}", f"`{' '.join(['lorafit', name, *words, '[OPTIONS]'])}`", ""]
    lines += [_flat(command.help or ""), ""]
    rows = [f"| `{word}` | {_cell(argument.help)} | |" for word, argument in zip(words, arguments, strict=True)]
    rows += [f"| {_flags(option)} | {_cell(option.help)} | {_default(option)} |" for option in options]
    lines += ["| argument or flag | meaning | default |", "|---|---|---|", *rows, ""]
    return "\n".join([*lines, *_examples(command.epilog or "")])


def _examples(epilog: str) -> list[str]:
    """Return the commands of an epilog as a block, and nothing where it has none."""
    typed = [line.strip() for line in epilog.splitlines() if line.strip().startswith("lorafit ")]
    return ["```sh", *typed, "```", ""] if typed else []


def _argument_word(argument: Any) -> str:
    word = f"{argument.name.upper()}{'…' if argument.nargs == -1 else ''}"
    return word if argument.required else f"[{word}]"


def _flags(option: Any) -> str:
    names = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    return f"{names} `{option.metavar}`" if option.metavar else names


def _default(option: Any) -> str:
    default = option.default
    return "" if default is None or isinstance(default, bool) or callable(default) or default == [] else f"`{default}`"


def settings_page() -> str:
    """Return the page of settings, a table for each group of RunConfig's fields."""
    opening = (
        "A setting stands in a recipe as `key: value`, or on the command line as `--set key=value`. "
        "[Train](../guides/train.md) says how recipes, flags and the plan go together. "
        "`lorafit settings NAME` shows one setting in the terminal."
    )
    sections = [f"## {title}\n{_settings_table(keys)}\n" for title, keys in _groups()]
    return "\n".join([MADE, "# Settings", "", opening, "", *sections, _other_names()])


def _groups() -> Iterator[tuple[str, list[str]]]:
    """Yield the titles that comments give to RunConfig's fields, with the fields below each."""
    title, keys = "Settings", []
    for line in inspect.getsource(RunConfig).splitlines():
        key = line.strip().partition(":")[0]
        if line.startswith("    # "):
            if keys:
                yield title, keys
            title, keys = line.strip(" #").capitalize(), []
        elif line.startswith("    ") and not line.startswith("     ") and key in RunConfig.model_fields:
            keys.append(key)
    yield title, keys


def _settings_table(keys: list[str]) -> str:
    rows = ["| key | default | values | meaning | when to change it |", "|---|---|---|---|---|"]
    for one in map(describe_setting, keys):
        default = one.shown_default if one.shown_default == "–" else f"`{one.shown_default}`"
        cells = [f"`{one.name}`", default, _cell(one.values), _cell(one.meaning), _cell(one.advice)]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _other_names() -> str:
    """Return the names of other tools, and of older releases, that each setting is taken under."""
    rows = ["## Other names", "These names set the same. [Coming from](../coming-from.md) sorts them by tool.", ""]
    rows += ["| key | other names |", "|---|---|"]
    for one in map(describe_setting, RunConfig.model_fields):
        if one.aliases:
            rows.append(f"| {one.name} | {', '.join(f'`{alias}`' for alias in one.aliases)} |")
    return "\n".join(rows)


def families_page() -> str:
    """Return the page of model families, as bench/families.py tried them."""
    tried = tried_families()
    versions = ", ".join(f"{name} {number}" for name, number in tried.versions.items())
    working = sum(one.works for one in tried.families)
    opening = (
        f"`bench/families.py` walked each family from `plan` to `merge` on a tiny base ({tried.date}, {versions}). "
        f"{working} of {len(tried.families)} work at every stage. `lorafit models` prints this table. "
        "A family that is not listed has not been walked yet: `lorafit plan` says whether it trains."
    )
    how = (
        "Works means: `qv` and `all-linear` train, the run answers, merges onto both bases pass their verification, "
        "and the first loss and the merged logits are within 1e-3 of plain transformers and PEFT, each row alone."
    )
    rows = [
        "| family | works | rows | `qv` adapts | `all-linear` adapts | what is refused |",
        "|---|---|---|---|---|---|",
    ]
    for one in tried.families:
        verdict = "yes" if one.works else "in part" if one.rows else "no"
        kinds = {"packed": "packed", "padded": "padded", "alone": "one a forward", "": ""}[one.rows]
        cells = [f"`{one.name}`", verdict, kinds, ", ".join(one.qv), ", ".join(one.all_linear), _cell(one.reason)]
        rows.append(f"| {' | '.join(cells)} |")
    unbuilt = [f"| `{name}` | {_cell(reason)} |" for name, reason in tried.unbuilt.items()]
    if unbuilt:
        why = "transformers built no tiny base of these families, so they could not be walked:"
        rows += ["", why, "", "| family | transformers' error |", "|---|---|", *unbuilt]
    return "\n".join([MADE, "# Model families", "", opening, "", how, "", *rows])


def _cell(text: str | None) -> str:
    return _flat(text or "").replace("|", "\\|")


def _flat(text: str) -> str:
    return " ".join(text.split())


def pages() -> dict[Path, str]:
    """Return each generated page with its text."""
    return {
        REFERENCE / "cli.md": cli_page().rstrip() + "\n",
        REFERENCE / "families.md": families_page().rstrip() + "\n",
        REFERENCE / "settings.md": settings_page().rstrip() + "\n",
    }


def main() -> int:
    """Write the pages; with --check only compare them."""
    stale = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is stale: run python docs/generate.py")  # noqa: T201
        return 1 if stale else 0
    REFERENCE.mkdir(exist_ok=True)
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    print(f"wrote {', '.join(path.name for path in pages())}")  # noqa: T201
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
