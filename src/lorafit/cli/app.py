"""The `lorafit` program: its commands, and how errors reach the user."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from lorafit import __version__
from lorafit.cli import chat, check, demo, merge, plan, reference, train
from lorafit.cli.screen.console import piped, show_error, show_json
from lorafit.errors import LorafitError, UsageError

DEBUG_FLAG, JSON_FLAG = "--debug", "--json"
INTERRUPTED = 130
INTERNAL = 70


def _with_plain_types(params: list[Any]) -> list[Any]:
    """Return `params`; the help then shows no type for switches."""
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


class _Plain(TyperCommand):
    """A command whose help shows no type for switches."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_plain_types(super().get_params(ctx))


class _InOrder(TyperGroup):
    """Lists the commands in the order one uses them."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(self.commands)

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_plain_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> object:
        """Run the command; Ctrl-C is said here, for typer would end without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show_error("at once; nothing on the disk is damaged", "stopped")
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_InOrder,
    name="lorafit",
    help="Fine-tune a language model on your own examples, and prove what you made.",
    epilog="Start with 'lorafit demo', or 'lorafit check YOUR.jsonl'. Add --debug to any command to see a traceback.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(cls=_Plain, epilog=check.EXAMPLES)(check.check)
app.command(cls=_Plain, epilog=plan.EXAMPLES)(plan.plan)
app.command(cls=_Plain, epilog=train.EXAMPLES)(train.train)
app.command(cls=_Plain, epilog=chat.EXAMPLES)(chat.chat)
app.command(cls=_Plain, epilog=merge.EXAMPLES)(merge.merge)
app.command(cls=_Plain, epilog=demo.EXAMPLES)(demo.demo)
app.command(cls=_Plain, epilog=reference.SETTINGS_EXAMPLES)(reference.settings)
app.command(cls=_Plain, epilog=reference.EXPLAIN_EXAMPLES)(reference.explain)
app.command(hidden=True)(reference.help)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. A user's mistake ends in one sentence and exit code 1 or 2; --debug shows the trace.

    With --json standard output has an object for errors too; the sentence stands on standard error either way.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = DEBUG_FLAG in given
    given = [argument for argument in given if argument != DEBUG_FLAG] or ["--help"]
    try:
        with piped():
            sys.exit(app(given, prog_name="lorafit", standalone_mode=False))
    except Exception as error:
        if debug:
            raise
        _end(_told(error, given), as_json=JSON_FLAG in given)


def _told(error: Exception, given: list[str]) -> LorafitError:
    """`error` as a sentence and an exit code."""
    if isinstance(error, LorafitError):
        return error
    if hasattr(error, "format_message"):  # of the command line's own parser
        return _misuse(error, given)
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        fix = "free some, or raise the limit that ulimit -v or the container sets"
        return LorafitError("the memory that this process may use is full", fix=fix)
    if isinstance(error, OSError):
        place = str(error.filename) if error.filename else None
        return LorafitError(error.strerror or str(error), where=place, fix="check the disk and the path")
    if type(error).__name__ == "Abort":
        return UsageError("no answer was given", fix="pass data and --base")
    # ours to mend: say so, and how to show us
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"internal error ({type(error).__name__}: {first})"
    told = LorafitError(what, fix="run it with --debug and report the trace")
    told.exit_code = INTERNAL
    return told


def _misuse(error: Any, given: list[str]) -> UsageError:
    """A wrong flag or command as a sentence; a flag that is a setting says how to set it."""
    verb = given[0] if given else ""
    flag = getattr(error, "option_name", None)
    if flag is None:
        names = [name for name in (command.name for command in _commands()) if name]
        near = difflib.get_close_matches(verb, names, n=1)
        fix = f"did you mean 'lorafit {near[0]}'?" if near and verb not in names else f"see 'lorafit {verb} --help'"
        what = re.sub(r"[.;]? *\(?Did you mean .*", "", error.format_message()).rstrip(".")  # the fix says it
        return UsageError(what[:1].lower() + what[1:], fix=fix if verb in names or near else "see 'lorafit --help'")
    if flag in _flags_of(verb):
        return _misused_value(flag, takes_none="not take" in error.format_message())
    return UsageError(f"'lorafit {verb}' has no flag {flag}", fix=_flag_fix(verb, flag))


def _misused_value(flag: str, *, takes_none: bool) -> UsageError:
    """A known flag without the value that it needs, or with one that it does not take."""
    from lorafit.cli.flags import example_of

    if takes_none:
        return UsageError(f"{flag} takes no value", fix=f"write {flag} alone")
    return UsageError(f"{flag} needs a value, as in {flag} {example_of(flag)}")


def _flag_fix(verb: str, flag: str) -> str:
    """What to write instead of the unknown `flag`."""
    from lorafit.config import RunConfig  # pydantic stays out of --help
    from lorafit.config.setting_aliases import advice_for, our_name
    from lorafit.config.setting_reference import describe_setting

    offered = _flags_of(verb)
    name = flag.lstrip("-").partition("=")[0]
    key = our_name(name.replace("-", "_"), RunConfig.model_fields)
    if key in RunConfig.model_fields and "--set" in offered:
        from lorafit.cli.flags import flag_of

        own = flag_of(key)
        return f"write {own}" if own in offered else f"write --set {describe_setting(key).assignment}"
    near = difflib.get_close_matches(flag, offered, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    advice = advice_for(name, RunConfig.model_fields) if "--set" in offered else ""
    if meant := re.fullmatch(r"did you mean '(\w+)'\?", advice):
        return _flag_fix(verb, meant[1])
    return advice if advice.startswith("write") else f"see 'lorafit {verb} --help'"


def _commands() -> list[Any]:
    group: Any = typer.main.get_command(app)
    return list(group.commands.values())


def _flags_of(verb: str) -> list[str]:
    found = next((command for command in _commands() if command.name == verb), None)
    return [flag for parameter in found.params for flag in parameter.opts if flag.startswith("--")] if found else []


def _end(error: LorafitError, *, as_json: bool) -> NoReturn:
    if as_json:
        said = {"what": error.what, "where": error.where, "fix": error.fix}
        # where even this cannot be written, the sentence and the exit code hold
        with contextlib.suppress(OSError), piped():
            show_json({"ok": error.exit_code == 0, "exit_code": error.exit_code, "error": said})
    show_error(error.sentence, error.label)
    sys.exit(error.exit_code)
