"""chat: the command `lorafit chat`."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.screen.console import PEOPLE, say, show_json
from lorafit.errors import UsageError
from lorafit.imports import importing_torch

if TYPE_CHECKING:
    from lorafit.serve import Session

EXAMPLES = """Examples:

lorafit chat runs/rows-Qwen3-8B --compare

lorafit chat runs/rows-Qwen3-8B --prompt "Where is my order?"

lorafit chat runs/rows-Qwen3-8B/exports/merged"""
LEAVE = ("", "exit", "quit", "/exit", "/quit", "/bye")
COMMANDS = "/new starts a new conversation; exit, /exit, an empty line or Ctrl-D ends it"

Messages = list[dict[str, str]]


def chat(
    run: Annotated[str, typer.Argument(help="Run directory of a trained run, or a merged model.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="Answer this prompt and exit.", show_default=False)
    ] = None,
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", help="System text before the conversation.", show_default=False),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show answers of base and tuned model.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="NUMBER", min=1, help="Most tokens of an answer.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="NUMBER", min=0, help="Sampling temperature; 0 is greedy.")
    ] = 0.0,
    checkpoint: flags.Checkpoint = "last",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Talk to a trained run or a merged model. Without --prompt it is a conversation, one line a turn."""
    with importing_torch():
        from lorafit.api.load import load

    if json and prompt is None:
        raise UsageError("a conversation has no JSON output", where="--json", fix="add --prompt")
    session = load(run, checkpoint=checkpoint)
    if compare and session.is_merged:
        raise UsageError("a merged model has no base to compare with", where="--compare", fix="name the run instead")
    if session.weights is not None and session.weights.step is not None and not json:
        say(f"[dim]answers of step {session.weights.step}[/dim]")
    if session.left_out and not json:
        left_out = ", ".join(f"{name} {value}" for name, value in session.left_out.items())
        say(f"[dim]answers leave out {escape(left_out)} of the base's generation_config.json[/dim]")
    answering = _Answering(session, system, compare, max_new_tokens, temperature)
    if prompt is not None:
        answering.once(prompt, json)
        return
    answering.converse()


class _Answering:
    def __init__(
        self, session: Session, system: str | None, compare: bool, max_new_tokens: int, temperature: float
    ) -> None:
        self.session, self.compare = session, compare
        self.before: Messages = [{"role": "system", "content": system}] if system else []
        self.answer = partial(session.answer, max_new_tokens=max_new_tokens, temperature=temperature)

    def once(self, prompt: str, json: bool) -> None:
        messages = [*self.before, {"role": "user", "content": prompt}]
        if not json:
            self.reply(messages)
            return
        answer = {"prompt": prompt, "tuned": self.answer(messages)}
        if self.compare:
            answer["base"] = self.answer(messages, tuned=False)
        show_json(answer)

    def reply(self, messages: Messages) -> str:
        if self.compare:
            say("[yellow]base [/yellow] " + escape(self.answer(messages, tuned=False)))
            PEOPLE.print("[green]tuned[/green] ", end="")
        pieces: list[str] = []

        def stream(text: str) -> None:
            pieces.append(text)
            PEOPLE.file.write(text)
            PEOPLE.file.flush()

        answer = self.answer(messages, on_text=stream)
        PEOPLE.file.write(answer.removeprefix("".join(pieces)) + "\n")
        return answer

    def converse(self) -> None:
        messages: Messages = [*self.before]
        at_terminal = sys.stdin.isatty()
        if at_terminal:
            say(f"[dim]one line a turn; {COMMANDS}[/dim]")
        while True:
            try:
                line = PEOPLE.input("[bold]you[/bold]   ") if at_terminal else input()
            except EOFError:
                return
            word = line.strip()
            if word in LEAVE if at_terminal else not word:
                return
            if at_terminal and word.startswith("/"):
                messages = [*self.before] if word == "/new" else messages
                say(f"[dim]{'a new conversation' if word == '/new' else COMMANDS}[/dim]")
                continue
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": self.reply(messages)})
