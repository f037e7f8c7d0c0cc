"""responses: the route /v1/responses of the builtin engine, for texts. Nothing is stored.

Source: OpenAI's API reference, Responses.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from lorafit.serve.http.answering import Answering, chat_prompt
from lorafit.serve.http.completions import ended, respond
from lorafit.serve.http.errors import ApiError
from lorafit.serve.http.requests import ResponsesRequest, parse, read_body, text_messages
from lorafit.serve.http.server import server_of, tenant_of


async def answer(request: Request) -> Response:
    """Answer a text, or a list of messages."""
    server = server_of(request)
    asked: ResponsesRequest = parse(ResponsesRequest, await read_body(request))
    _require_text(asked)
    prompt = await asyncio.to_thread(chat_prompt, server, text_messages(_messages(asked)))
    answering = Answering(server, tenant_of(request), asked, [prompt], asked.max_output_tokens)
    made = _Made(answering, asked)
    return await respond(request, answering, made.whole, made.events)


def _require_text(asked: ResponsesRequest) -> None:
    """Raise ApiError for what the builtin engine has not: tools, schemas, and responses that are kept."""
    kind = (asked.text or {}).get("format")
    wants = {
        "tools": bool(asked.tools),
        "text.format": kind is not None and (not isinstance(kind, dict) or kind.get("type") != "text"),
        "previous_response_id": asked.previous_response_id is not None,
        "background": bool(asked.background),
        "n": (asked.n or 1) != 1,
    }
    if wanted := next((name for name, is_wanted in wants.items() if is_wanted), None):
        raise ApiError(501, f"the builtin engine has no {wanted} in /v1/responses; it answers text, once", wanted)


def _messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the conversation as chat has it."""
    items = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    for place, item in enumerate(items):
        if item.get("type", "message") != "message":
            raise ApiError(501, "the builtin engine reads items of type message alone", f"input.{place}")
    own = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    return own + [{key: item[key] for key in ("role", "content") if key in item} for item in items]


class _Made:
    """Make the objects and events of one response."""

    def __init__(self, answering: Answering, asked: ResponsesRequest) -> None:
        self.answering, self.asked = answering, asked
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._numbers = itertools.count()

    async def whole(self) -> Mapping[str, Any]:
        """Return the finished response."""
        text, reason = "", ""
        async with aclosing(self.answering.pieces()) as pieces:
            async for piece in pieces:
                text, reason = text + piece.text, piece.reason or ""
        return self._finished(text, reason)

    def events(self) -> AsyncGenerator[str, None]:
        """Yield the events of a stream."""

        def told(status: int, message: str) -> str:
            return self._event("error", code=str(status), message=message, param=None)

        return ended(self.answering, self._events(), told)

    async def _events(self) -> AsyncGenerator[str, None]:
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress", []))
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **place, part=_part(""))
        text, reason = "", ""
        async with aclosing(self.answering.pieces()) as pieces:
            async for piece in pieces:
                text, reason = text + piece.text, piece.reason or ""
                if piece.text:
                    yield self._event("response.output_text.delta", **place, delta=piece.text, logprobs=[])
        finished = self._finished(text, reason)
        yield self._event("response.output_text.done", **place, text=text, logprobs=[])
        yield self._event("response.content_part.done", **place, part=_part(text))
        yield self._event("response.output_item.done", output_index=0, item=finished["output"][0])
        yield self._event(f"response.{finished['status']}", response=finished)

    def _finished(self, text: str, reason: str) -> dict[str, Any]:
        status = "incomplete" if reason == "length" else "completed"
        used = self.answering.usage()
        usage = {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": used["total_tokens"],
        }
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._response(status, [self._message(status, [_part(text)])], usage=usage, incomplete_details=cut)

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.item, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        asked = self.asked
        return {
            "id": self.id, "object": "response", "created_at": self.created, "status": status, "error": None,
            "incomplete_details": None, "instructions": asked.instructions, "model": asked.model, "output": output,
            "max_output_tokens": asked.max_output_tokens, "metadata": {}, "parallel_tool_calls": False,
            "previous_response_id": None, "store": False, "temperature": asked.temperature or 0.0,
            "top_p": 1.0 if asked.top_p is None else asked.top_p, "text": {"format": {"type": "text"}},
            "tool_choice": "none", "tools": [], "usage": None, **more,
        }  # fmt: skip

    def _event(self, kind: str, **more: Any) -> str:
        content = {"type": kind, "sequence_number": next(self._numbers), **more}
        return f"event: {kind}\ndata: {json.dumps(content, ensure_ascii=False)}\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
