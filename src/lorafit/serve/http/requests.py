"""requests: the bodies of requests, read and checked before any work is done."""

from __future__ import annotations

import asyncio
import difflib
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
NEAR = 0.85
"""Likeness from which a field's name is taken for a misspelt one."""
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of a content's parts; the last two are those of /v1/responses."""
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls", "include", "truncation", "request_id", "cache_prompt", "usage", "prediction",
})  # fmt: skip
"""Fields of OpenAI's clients and of other servers' that change no answer of this engine."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_k": (-1,), "repetition_penalty": (1,), "length_penalty": (1,), "typical_p": (1,), "best_of": (1,),
    "add_generation_prompt": (True,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "modalities": (["text"],), "reasoning_effort": ("none",), "function_call": ("none", "auto"),
    "tool_choice": ("none", "auto"),
}  # fmt: skip
"""Values with which a field that the engine has not asks for nothing. So do null, false, 0 and whatever is empty."""
ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip
"""Roles of messages, and those of the training data that they are."""
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]], Field(max_length=MAX_STOPS)]


class StreamOptions(BaseModel):
    """Hold what a stream has beside tokens."""

    include_usage: bool = False


class SamplingFields(BaseModel):
    """Hold the fields that chat and completions share. `parse` refuses others, unless they change no answer."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str = Field(max_length=256)
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)] | Stops | None = Field(
        None, description=f"is a text or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters"
    )
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

    prompt: str | list[int] | list[str] | list[list[int]] = Field(
        description="is a text, a list of token ids, or a list of either kind"
    )
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
    if issubclass(kind, SamplingFields):
        _require_known(kind, content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    name, *inner = map(str, first["loc"])  # a field, and then places within it or the names of its types
    described = kind.model_fields[name].description
    if described and first["type"] != "missing":
        raise ApiError(400, f"{name} {described}", name)
    where = ".".join([name, *filter(str.isdigit, inner)])
    raise ApiError(400, f"{where}: {first['msg'][:200]}", where)


def _require_known(kind: type[SamplingFields], content: Mapping[str, Any]) -> None:
    """Raise ApiError for a field that would change the answer where the engine had it."""
    for name, value in content.items():
        if name in kind.model_fields or name in IGNORED or not value or value in NEUTRAL.get(name, ()):
            continue
        if near := difflib.get_close_matches(name, kind.model_fields, 1, NEAR):
            raise ApiError(400, f"there is no field {name[:64]}; did you mean {near[0]}?", name[:64])
        what = f"the builtin engine has no field {name[:64]}; leave it out, or merge the run, and serve it with vLLM"
        raise ApiError(501, what, name[:64])


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return messages whose roles are those of training and whose contents are texts. Raises ApiError.

    OpenAI's lists of text parts are joined.
    """
    made = []
    for place, message in enumerate(messages):
        where = f"messages.{place}"
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f"the role of a message is one of {', '.join(ROLES)}", f"{where}.role")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text_part(part, where) for part in content)
        if not isinstance(content, str) and not (content is None and role == "assistant"):
            raise ApiError(400, "the content of a message is a text", f"{where}.content")
        made.append({**message, "role": ROLES[role], "content": content or ""})
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
