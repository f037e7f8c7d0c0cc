"""requests: the bodies of requests, read and checked before any work is done."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request

from lorafit.config.foreign_text import nests_deeper
from lorafit.serve.http.errors import ApiError

MAX_BODY_BYTES = 4 << 20
MAX_DEPTH = 24
BODY_S = 30.0
MAX_STOPS, MAX_STOP_LENGTH = 8, 256
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's parts; the last two are those of /v1/responses."""
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)]


class StreamOptions(BaseModel):
    """Hold what a stream has beside tokens."""

    include_usage: bool = False


class SamplingFields(BaseModel):
    """Hold the fields that chat and completions share. Unknown fields are ignored, as OpenAI's clients send many."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str = Field(max_length=256)
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)] | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        """Return True if a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingFields):
    """Hold the body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None


class CompletionRequest(SamplingFields):
    """Hold the body of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: int | None = None


class ResponsesRequest(SamplingFields):
    """Hold the body of /v1/responses."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    tools: list[dict[str, Any]] | None = None
    text: dict[str, Any] | None = None


class TokenizeRequest(BaseModel):
    """Hold the body of /tokenize: a text, or a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True


class AdapterRequest(BaseModel):
    """Hold the body of the routes that load and unload adapters."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: Annotated[str, Field(max_length=256)]
    lora_path: Annotated[str, Field(max_length=4096)] | None = None
    load_inplace: bool = False


async def read_body(request: Request, most: int = MAX_BODY_BYTES) -> dict[str, Any]:
    """Return the JSON object in the body. Raises ApiError for anything else."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise ApiError(413, f"the body is larger than {most >> 10} KiB")
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_S:g} s") from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the body was whole") from None
    try:
        content = json.loads(b"".join(parts).decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is no JSON object")
    if nests_deeper(content, MAX_DEPTH):
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels")
    _require_text(content)
    return content


def parse(kind: type[Any], content: Mapping[str, Any]) -> Any:
    """Return `content` as a request of `kind`. Raises ApiError that names the first wrong field."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "function-")))
        raise ApiError(400, f"{field or 'the body'}: {first['msg'][:200]}", field or None) from None


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose contents are texts; OpenAI's lists of text parts are joined. Raises ApiError."""
    made = []
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        if not isinstance(message.get("role"), str):
            raise ApiError(400, "a message needs a role", where)
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part, where) for part in content)
        if not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
            raise ApiError(400, "the content of a message is a text", f"{where}.content")
        made.append({**message, "content": content or ""})
    return made


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") not in TEXT_PARTS or not isinstance(part.get("text"), str):
        raise ApiError(400, "only parts of type text are supported", f"{where}.content")
    return str(part["text"])


def _refuse_constant(name: str) -> Any:
    raise ValueError(name)


def _require_text(content: Any) -> None:
    """Raise ApiError for lone surrogates, which JSON can write and no tokenizer can read."""
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the body holds half a character (a lone surrogate)") from None
