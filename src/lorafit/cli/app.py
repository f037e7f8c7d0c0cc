"""The `lorafit` program: its verbs, and how errors reach the user."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from lorafit import __version__
from lorafit.cli.chat import chat
from lorafit.cli.check import check
from lorafit.cli.console import piped, show_error, show_json
from lorafit.cli.demo import demo
from lorafit.cli.merge import merge
from lorafit.cli.plan import plan
from lorafit.cli.train import train
from lorafit.errors import LorafitError

DEBUG_FLAG, JSON_FLAG = "--debug", "--json"
INTERRUPTED = 130
INTERNAL = 70


class _InOrder(TyperGroup):
    """Lists the verbs in the order one uses them."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: Any) -> object:
        """Run the verb; Ctrl-C is said here, for typer would end without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            show_error("at once; what is on the disk is whole", "stopped")
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_InOrder,
    name="lorafit",
    help="Fine-tune a language model with LoRA over a frozen 4-bit base, and prove what you made.",
    epilog="Start with 'lorafit demo'. Add --debug to any verb to see a traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for verb in (check, plan, train, chat, merge, demo):
    app.command()(verb)


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
    given = [argument for argument in given if argument != DEBUG_FLAG]
    try:
        with piped():
            app(given, prog_name="lorafit")
    except Exception as error:
        if debug:
            raise
        _end(_told(error), as_json=JSON_FLAG in given)


def _told(error: Exception) -> LorafitError:
    """`error` as a sentence and an exit code."""
    if isinstance(error, LorafitError):
        return error
    if isinstance(error, OSError):
        place = str(error.filename) if error.filename else None
        return LorafitError(error.strerror or str(error), where=place, fix="check the disk and the path")
    # ours to mend: say so, and how to show us
    first = (str(error).strip().splitlines() or [""])[0]
    what = f"internal error ({type(error).__name__}: {first})"
    told = LorafitError(what, fix="run it with --debug and report the trace")
    told.exit_code = INTERNAL
    return told


def _end(error: LorafitError, *, as_json: bool) -> NoReturn:
    if as_json:
        said = {"what": error.what, "where": error.where, "fix": error.fix}
        # where even this cannot be written, the sentence and the exit code hold
        with contextlib.suppress(OSError), piped():
            show_json({"ok": error.exit_code == 0, "exit_code": error.exit_code, "error": said})
    show_error(error.sentence, error.label)
    sys.exit(error.exit_code)
