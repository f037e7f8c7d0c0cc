"""lorafit chat"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lorafit.cli import flags
from lorafit.cli.console import PEOPLE, say, show_json
from lorafit.errors import UsageError

if TYPE_CHECKING:
    from lorafit.serve import Session

Messages = list[dict[str, str]]


def chat(
    run: flags.Run,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and end.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with base and tuned side by side.")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 is greedy.")] = 0.0,
    json: flags.Json = False,
) -> None:
    """Talk to a run's result. Without --prompt: a conversation, one line a turn; an empty line ends it."""
    from lorafit.api.load import load

    if json and prompt is None:
        raise UsageError("a conversation is not one JSON object", where="--json", fix="add --prompt")
    session = load(run)
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
        if sys.stdin.isatty():
            say("[dim]one line a turn; an empty line ends the conversation[/dim]")
        while True:
            try:
                line = PEOPLE.input("[bold]you[/bold]   ") if sys.stdin.isatty() else input()
            except EOFError:
                return
            if not line.strip():
                return
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": self.reply(messages)})
