"""lorafit chat"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lorafit.cli.screen.console import PEOPLE, say, show_json
from lorafit.errors import UsageError

if TYPE_CHECKING:
    from lorafit.serve import Session

EXAMPLES = """Examples:

lorafit chat runs/rows-Qwen3-8B --compare

lorafit chat runs/rows-Qwen3-8B --prompt "Where is my order?"

lorafit chat runs/rows-Qwen3-8B/exports/merged-quantized"""
LEAVE = ("", "exit", "quit", "/exit", "/quit", "/bye")
COMMANDS = "/new begins a new conversation; exit, /exit, an empty line or Ctrl-D ends it"

Messages = list[dict[str, str]]


def chat(
    run: Annotated[
        str, typer.Argument(help="The run directory that train made, or a merged model.", show_default=False)
    ],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and end.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base and tuned side by side.")] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="NUMBER", min=1, help="Longest answer, in tokens.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="NUMBER", min=0, help="0 is greedy.")] = 0.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Talk to a trained run or a merged model. Without --prompt: a conversation, one line a turn."""
    from lorafit.api.load import load

    if json and prompt is None:
        raise UsageError("a conversation is not one JSON object", where="--json", fix="add --prompt")
    session = load(run)
    if compare and session.is_merged:
        raise UsageError("a merged model has no base to compare with", where="--compare", fix="name the run instead")
    answering = _Answering(session, compare, max_new_tokens, temperature)
    if prompt is not None:
        answering.once(prompt, json)
        return
    answering.converse()


class _Answering:
    def __init__(self, session: Session, compare: bool, max_new_tokens: int, temperature: float) -> None:
        self.session, self.compare = session, compare
        self.answer = partial(session.answer, max_new_tokens=max_new_tokens, temperature=temperature)

    def once(self, prompt: str, json: bool) -> None:
        messages = [{"role": "user", "content": prompt}]
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
        messages: Messages = []
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
                messages = [] if word == "/new" else messages
                say(f"[dim]{'a new conversation' if word == '/new' else COMMANDS}[/dim]")
                continue
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": self.reply(messages)})
