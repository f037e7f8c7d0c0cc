"""app: the `lorafit` program, its commands, and the display of errors."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from lorafit import __version__
from lorafit.cli import chat, check, demo, eval, export, flags, merge, plan, reference, serve, train
from lorafit.cli.screen.console import is_follower, piped, show_error, show_json
from lorafit.errors import LorafitError, ProcessLost, RunFinished, TrainingStopped, UsageError

DEBUG_FLAG, JSON_FLAG = "--debug", "--json"
INTERRUPTED = 130
INTERNAL = 70


def _with_plain_types(params: list[Any]) -> list[Any]:
    """Return `params`; the help then shows no type for switches and arguments, and arguments in capitals."""
    for param in params:
        if param.param_type_name == "argument":
            param.metavar = param.metavar or param.name.upper()
            param.display_type_rich = _no_type
        elif getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params


def _no_type(ctx: object) -> None:
    """Replace typer's `<list[str]>` beside an argument."""


class _Plain(TyperCommand):
    """A command whose help shows no type for switches and arguments."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_plain_types(super().get_params(ctx))


class _InOrder(TyperGroup):
    """List the commands in the order of use."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(self.commands)

    def get_params(self, ctx: Any) -> list[Any]:
        return _with_plain_types(super().get_params(ctx))

    def invoke(self, ctx: Any) -> object:
        """Run the command, and report Ctrl-C, since typer would end in silence."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show_error("ended at once; all files on disk are complete", "stopped")
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_InOrder,
    name="lorafit",
    help="Fine-tune a language model on your own examples, and verify the result.",
    epilog="Start with 'lorafit demo', or 'lorafit check YOUR.jsonl'. Add --debug to any command to see a traceback.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command(cls=_Plain, epilog=check.EXAMPLES)(check.check)
app.command(cls=_Plain, epilog=plan.EXAMPLES)(plan.plan)
app.command(cls=_Plain, epilog=train.EXAMPLES)(train.train)
app.command(cls=_Plain, epilog=chat.EXAMPLES)(chat.chat)
app.command(cls=_Plain, epilog=eval.EXAMPLES)(eval.eval)
app.command(cls=_Plain, epilog=merge.EXAMPLES)(merge.merge)
app.command(cls=_Plain, epilog=export.EXAMPLES)(export.export)
app.command(cls=_Plain, epilog=serve.EXAMPLES)(serve.serve)
app.command(cls=_Plain, epilog=demo.EXAMPLES)(demo.demo)
app.command(cls=_Plain, epilog=reference.SETTINGS_EXAMPLES)(reference.settings)
app.command(cls=_Plain, epilog=reference.MODELS_EXAMPLES)(reference.models)
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
    """Run the command line. User mistakes end in one sentence and exit code 1 or 2.

    --debug shows the traceback. With --json standard output has an object for errors too; the sentence is on standard
    error either way.
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
        try:
            ours = _as_lorafit_error(error, given)
            flags.named_as_typed(ours, given)
            _end(ours, as_json=JSON_FLAG in given)
        except MemoryError:  # not even enough is left to tell it well
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, FULL_MEMORY)
            os._exit(LorafitError.exit_code)


def _as_lorafit_error(error: Exception, given: list[str]) -> LorafitError:
    """Return `error` as a LorafitError with one sentence and an exit code."""
    if isinstance(error, LorafitError):
        return error
    if hasattr(error, "format_message"):  # from the command line's parser
        return _misuse(error, given)
    if _is_out_of_memory(error):
        fix = "free some, or raise the limit that ulimit -v or the container sets"
        return LorafitError("the memory that this process may use is full", fix=fix)
    if isinstance(error, OSError):
        path = str(error.filename) if error.filename else None
        return LorafitError(error.strerror or str(error), where=path, fix="check the disk and the path")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return UsageError("a path holds a NUL character", fix="remove it")
    if any(words in str(error) for words in UNREADABLE):
        return LorafitError(str(error).strip().splitlines()[0], fix="check the disk and the path")
    if type(error).__name__ == "Abort":
        return UsageError("no answer was given", fix="pass data and --base")
    # a bug of lorafit: say so, and how to report it
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"internal error ({type(error).__name__}: {first})"
    internal = LorafitError(what, fix="run it with --debug and report the trace")
    internal.exit_code = INTERNAL
    return internal


FULL_MEMORY = b"error: the memory that this process may use is full; free some, or raise its limit\n"
UNREADABLE = ("unable to open file <", "unable to mmap ", "(os error ")
"""What torch, in a RuntimeError, and Rust's libraries, in a bare Exception, say of a file that the disk denies."""
OUT_OF_MEMORY = ("can't start new thread", "can't allocate memory", "cannot allocate memory", "failed to map segment")
"""What Python, torch and the loader of libraries say without memory, in errors of other kinds."""


def _is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if the host's memory ended, in `error` or in one that it came of."""
    while error is not None:
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            return True
        if isinstance(error, RuntimeError | ImportError) and any(
            words in str(error).lower() for words in OUT_OF_MEMORY
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def _misuse(error: Any, given: list[str]) -> UsageError:
    """Return a wrong flag or command as a UsageError. For a setting's flag it says how to set it."""
    name = given[0] if given else ""
    flag = getattr(error, "option_name", None)
    if flag is None:
        names = [command.name for command in _commands() if command.name]
        near = difflib.get_close_matches(name, names, n=1)
        fix = f"did you mean 'lorafit {near[0]}'?" if near and name not in names else f"see 'lorafit {name} --help'"
        what = re.sub(r"[.;]? *\(?Did you mean .*|Value error, ", "", error.format_message()).rstrip(
            "."
        )  # the fix says it
        return UsageError(what[:1].lower() + what[1:], fix=fix if name in names or near else "see 'lorafit --help'")
    if flag in _flags_of(name):
        return _misused_value(flag, takes_none="not take" in error.format_message())
    return UsageError(f"'lorafit {name}' has no flag {flag}", fix=_flag_fix(name, flag))


def _misused_value(flag: str, *, takes_none: bool) -> UsageError:
    """Return the error of a known flag that lacks its value, or has one that it does not take."""
    from lorafit.cli.flags import example_of

    if takes_none:
        return UsageError(f"{flag} takes no value", fix=f"write {flag} alone")
    return UsageError(f"{flag} needs a value, as in {flag} {example_of(flag)}")


def _flag_fix(name: str, flag: str) -> str:
    """Return the correction of the unknown `flag`."""
    from lorafit.config import RunConfig  # pydantic stays out of --help
    from lorafit.config.setting_aliases import advice_for, our_name
    from lorafit.config.setting_reference import describe_setting

    offered = _flags_of(name)
    bare = flag.lstrip("-").partition("=")[0]
    key = our_name(bare.replace("-", "_"), RunConfig.model_fields)
    if key in RunConfig.model_fields and "--set" in offered:
        from lorafit.cli.flags import flag_of

        own = flag_of(key)
        return f"write {own}" if own in offered else f"write --set {describe_setting(key).assignment}"
    near = difflib.get_close_matches(flag, offered, n=1, cutoff=0.7)
    if near:
        return f"did you mean {near[0]}?"
    advice = advice_for(bare, RunConfig.model_fields) if "--set" in offered else ""
    if meant := re.fullmatch(r"did you mean '(\w+)'\?", advice):
        return _flag_fix(name, meant[1])
    return advice if advice.startswith("write") else f"see 'lorafit {name} --help'"


def _commands() -> list[Any]:
    group: Any = typer.main.get_command(app)
    return list(group.commands.values())


def _flags_of(name: str) -> list[str]:
    found = next((command for command in _commands() if command.name == name), None)
    return [flag for parameter in found.params for flag in parameter.opts if flag.startswith("--")] if found else []


def _end(error: LorafitError, *, as_json: bool) -> NoReturn:
    from lorafit.runs.launched import leave_error  # runs stays out of --help

    if leave_error(error):
        _leave(error.exit_code)
    if is_follower():  # process 0 says what all know; this one's own trouble is named with its number
        if not isinstance(error, UsageError | TrainingStopped | ProcessLost | RunFinished):
            show_error(f"process {os.environ['RANK']}: {error.sentence}", error.label)
        _leave(error.exit_code)
    if as_json:
        content = {"what": error.what, "where": error.where, "fix": error.fix}
        # stdout may be closed; the sentence and the exit code remain
        with contextlib.suppress(OSError), piped():
            show_json({"ok": error.exit_code == 0, "exit_code": error.exit_code, "error": content})
    show_error(error.sentence, error.label)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave(error.exit_code)
    sys.exit(error.exit_code)


def _leave(exit_code: int) -> NoReturn:
    """End this process without Python's clean-up, in which a group with a lost process would hang."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)
