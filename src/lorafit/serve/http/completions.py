"""completions: the routes /v1/chat/completions and /v1/completions of the builtin engine."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from lorafit.errors import LorafitError
from lorafit.serve.decoding import Chosen, EngineStopped
from lorafit.serve.http.answering import Answering, Piece, chat_prompt, text_prompt
from lorafit.serve.http.errors import LEFT, ApiError, as_api_error, error_content
from lorafit.serve.http.requests import ChatRequest, CompletionRequest, parse, read_body, text_messages
from lorafit.serve.http.server import server_of, tenant_of
from lorafit.serve.http.text_stream import UNFINISHED


async def chat(request: Request) -> Response:
    """Answer a conversation."""
    server = server_of(request)
    asked: ChatRequest = parse(ChatRequest, await read_body(request))
    if asked.tools or asked.tool_choice not in (None, "none", "auto"):
        raise ApiError(
            501, "the builtin engine does not parse tool calls; merge the run, and serve it with vLLM", "tools"
        )
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    prompt = await asyncio.to_thread(chat_prompt, server, text_messages(asked.messages))
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    most = asked.max_completion_tokens or asked.max_tokens
    answering = Answering(server, tenant_of(request), asked, [prompt], most, logprobs)
    return await _answered(request, answering, _ChatForm(answering))


async def complete(request: Request) -> Response:
    """Continue a text, or each of a list of texts."""
    server = server_of(request)
    asked: CompletionRequest = parse(CompletionRequest, await read_body(request))
    if asked.echo or (asked.best_of or 1) != 1:
        raise ApiError(501, "the builtin engine has no echo and no best_of", "echo" if asked.echo else "best_of")
    given: Any = asked.prompt
    prompts = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
    if len(prompts) > server.options.max_n:
        raise ApiError(400, f"a request has at most {server.options.max_n} prompts", "prompt")
    ids = [await asyncio.to_thread(text_prompt, server, each) if isinstance(each, str) else each for each in prompts]
    vocabulary = server.engine.vocabulary
    if any(not 0 <= token < vocabulary for each in ids for token in each):
        raise ApiError(400, f"token ids are between 0 and {vocabulary - 1:,}", "prompt")
    answering = Answering(server, tenant_of(request), asked, ids, asked.max_tokens or 16, asked.logprobs)
    return await _answered(request, answering, _TextForm(answering))


class _Form:
    """Make the objects of one route."""

    whole, chunk, prefix = "", "", ""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering
        self.tokenizer = answering.server.engine.base.template.tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        model = self.answering.fields.model
        return {"id": self.id, "object": kind, "created": self.created, "model": model, "choices": choices, **more}

    def opening(self) -> list[dict[str, Any]]:
        return []

    def delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def choice(self, index: int, text: str, reason: str, chosen: list[Chosen]) -> dict[str, Any]:
        raise NotImplementedError

    def token_text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False))


class _ChatForm(_Form):
    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(self.answering.count)
        ]

    def delta(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        logprobs = self.logprobs([piece.chosen] if piece.chosen else [])
        return {"index": piece.index, "delta": delta, "logprobs": logprobs, "finish_reason": piece.reason}

    def choice(self, index: int, text: str, reason: str, chosen: list[Chosen]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self.logprobs(chosen), "finish_reason": reason}

    def logprobs(self, chosen: list[Chosen]) -> dict[str, Any] | None:
        if self.answering.logprobs is None or not chosen:
            return None
        content = []
        for each in chosen:
            top = [self._entry(token, value) for token, value in each.top]
            content.append({**self._entry(each.token, each.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        # a token may be part of a character, of which no text tells the bytes
        return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else list(text.encode())}


class _TextForm(_Form):
    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def delta(self, piece: Piece) -> dict[str, Any]:
        return self.choice(piece.index, piece.text, piece.reason, [piece.chosen] if piece.chosen else [])

    def choice(self, index: int, text: str, reason: str | None, chosen: list[Chosen]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self.logprobs(chosen), "finish_reason": reason}

    def logprobs(self, chosen: list[Chosen]) -> dict[str, Any] | None:
        if self.answering.logprobs is None or not chosen:
            return None
        tokens = [self.token_text(each.token) for each in chosen]
        return {
            "tokens": tokens,
            "token_logprobs": [each.logprob for each in chosen],
            "top_logprobs": [{self.token_text(token): value for token, value in each.top} for each in chosen],
            "text_offset": [sum(map(len, tokens[:place])) for place in range(len(tokens))],
        }


async def _answered(request: Request, answering: Answering, form: _Form) -> Response:
    return await respond(request, answering, partial(_collect, answering, form), partial(_events, answering, form))


async def respond(
    request: Request,
    answering: Answering,
    collect: Callable[[], Coroutine[Any, Any, Mapping[str, Any]]],
    events: Callable[[], AsyncGenerator[str, None]],
) -> Response:
    """Answer with the object that `collect` makes, or with a stream of `events`. A client that leaves ends the work."""
    if answering.fields.stream:
        await answering.__aenter__()  # errors before the first token have a status of their own
        headers = {**answering.headers(), "cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(events(), media_type="text/event-stream", headers=headers)
    async with answering:
        work = asyncio.create_task(collect())
        left = asyncio.create_task(client_left(request))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                answering.status = LEFT
                return Response(status_code=LEFT)  # nobody reads it
            return JSONResponse(work.result(), headers=answering.headers())
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)


async def client_left(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(answering: Answering, form: _Form) -> Mapping[str, Any]:
    texts = [""] * answering.count
    chosen: list[list[Chosen]] = [[] for _ in texts]
    reasons = [""] * answering.count
    async with aclosing(answering.pieces()) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.text
            if piece.chosen is not None:
                chosen[piece.index].append(piece.chosen)
            reasons[piece.index] = piece.reason or ""
    choices = [form.choice(index, texts[index], reasons[index], chosen[index]) for index in range(len(texts))]
    return form.object(form.whole, choices, usage=answering.usage())


def _events(answering: Answering, form: _Form) -> AsyncGenerator[str, None]:
    return ended(answering, _pieces(answering, form), lambda status, what: _event(error_content(status, what)))


async def _pieces(answering: Answering, form: _Form) -> AsyncGenerator[str, None]:
    more: dict[str, Any] = {"usage": None} if answering.fields.wants_usage else {}
    for choice in form.opening():
        yield _event(form.object(form.chunk, [choice], **more))
    async with aclosing(answering.pieces()) as pieces:
        async for piece in pieces:
            if piece.text or piece.reason or answering.logprobs is not None:
                yield _event(form.object(form.chunk, [form.delta(piece)], **more))
    if answering.fields.wants_usage:
        yield _event(form.object(form.chunk, [], usage=answering.usage()))
    yield "data: [DONE]\n\n"


async def ended(
    answering: Answering, events: AsyncGenerator[str, None], told: Callable[[int, str], str]
) -> AsyncGenerator[str, None]:
    """Yield the `events` of a stream that was entered, and end it in every case.

    An error of the engine is one more event: `told` makes it of status and message.
    """
    error: BaseException | None = None
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except (LorafitError, EngineStopped) as problem:
        error, known = problem, as_api_error(problem)
        yield told(known.status, known.message)
    except BaseException as problem:
        error = problem
        raise
    finally:
        await answering.__aexit__(None, error, None)


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
