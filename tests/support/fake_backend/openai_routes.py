"""The OpenAI-compatible routes: as Ollama answers them on an Ollama server, as vLLM does elsewhere."""

import base64
import json
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tests.support.fake_backend import media_routes
from tests.support.fake_backend.content import (
    Json,
    ServerError,
    after_pause,
    canonical,
    last_user_text,
    prompt_tokens,
    split_evenly,
    text_of,
    tool_arguments,
    vector,
)
from tests.support.fake_backend.scripts import PLAIN, Received, Step, answer, compact, sse, stream

if TYPE_CHECKING:
    from tests.support.fake_backend.answers import HealthyServer

JSON = "application/json"
CREATED = 1787335200
_OLLAMA_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_VLLM_TYPES = {400: "BadRequestError", 404: "NotFoundError"}


def respond(healthy: "HealthyServer", request: Received) -> list[Step]:
    path, method = request.path, request.method
    if path == "/health" and healthy.kind == "openai":
        return answer(200, b"", "")
    get = path == "/v1/models" or path.startswith("/v1/models/")
    posts = {**_POSTS, **(media_routes.FORMS if healthy.kind == "ollama" else media_routes.ROUTES)}
    if not get and path not in posts:
        return _lost(healthy, 404, "404 page not found", "Not Found")
    if method != ("GET" if get else "POST"):
        return _lost(healthy, 405, "405 method not allowed", "Method Not Allowed")
    try:
        if path in media_routes.ROUTES:
            return posts[path](healthy, media_routes.fields_of(healthy, request))
        return _models(healthy, path) if get else posts[path](healthy, _fields_of(healthy, request))
    except ServerError as refused:
        return answer(refused.status, _error(healthy, refused), JSON)


def _lost(healthy: "HealthyServer", status: int, native: str, words: str) -> list[Step]:
    if healthy.kind == "ollama":
        return answer(status, native.encode(), PLAIN)
    return answer(status, {"detail": words}, JSON)


def _error(healthy: "HealthyServer", refused: ServerError) -> Json:
    if healthy.kind == "ollama":
        kind, code = _OLLAMA_TYPES.get(refused.status, "api_error"), None
    else:
        kind, code = _VLLM_TYPES.get(refused.status, "InternalServerError"), refused.status
    return {"error": {"message": str(refused), "type": kind, "param": None, "code": code}}


def _fields_of(healthy: "HealthyServer", request: Received) -> Json:
    try:
        fields = json.loads(request.body)
    except ValueError:
        raise ServerError(400, "Invalid JSON") from None
    if not isinstance(fields, dict):
        raise ServerError(400, "Input should be a valid dictionary")
    if healthy.kind == "openai":
        fields.setdefault("model", healthy.models[0] if healthy.models else "")
        if fields.get("stream_options") is not None and not fields.get("stream"):
            raise ServerError(400, "Stream options can only be defined when `stream=True`.")
    if not _has(healthy, fields.get("model") or ""):
        words = "model '{}' not found" if healthy.kind == "ollama" else "The model `{}` does not exist."
        raise ServerError(404, words.format(fields.get("model")))
    return fields


def _has(healthy: "HealthyServer", model: str) -> bool:
    return healthy.has(model) if healthy.kind == "ollama" else model in healthy.models


def _models(healthy: "HealthyServer", path: str) -> list[Step]:
    if path == "/v1/models":
        listed = [_entry(healthy, model) for model in healthy.models]
        nulled = healthy.kind == "ollama" and not listed
        return answer(200, {"object": "list", "data": None if nulled else listed}, JSON)
    model = unquote(path.removeprefix("/v1/models/"))
    if not _has(healthy, model):
        words = "model '{}' not found" if healthy.kind == "ollama" else "The model `{}` does not exist."
        raise ServerError(404, words.format(model))
    return answer(200, {**_entry(healthy, model), "id": model}, JSON)


def _entry(healthy: "HealthyServer", model: str) -> Json:
    if healthy.kind == "ollama":
        return {"id": canonical(model), "object": "model", "created": CREATED, "owned_by": "library"}
    named = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "vllm", "root": model}
    return {**named, "parent": None, "max_model_len": 4096, "permission": []}


def _usage(prompt: int, completion: int) -> Json:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _counted(healthy: "HealthyServer", fields: Json, completion: int) -> Json:
    usage = _usage(prompt_tokens(fields), completion)
    if healthy.cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": healthy.cached(fields)}
    return usage


def _timings(healthy: "HealthyServer", fields: Json) -> Json:
    if healthy.durations is None or healthy.kind == "ollama":
        return {}
    _, prefill, decode = healthy.durations(fields)
    return {"timings": {"prompt_ms": prefill * 1000, "predicted_ms": decode * 1000}}


def _wants_usage(healthy: "HealthyServer", fields: Json) -> bool:
    """vLLM includes the usage also for empty stream_options."""
    options = fields.get("stream_options")
    return options is not None and bool(options.get("include_usage", healthy.kind == "openai"))


def _common(healthy: "HealthyServer", fields: Json, kind: str, prefix: str) -> Json:
    ollama = healthy.kind == "ollama"
    named = {"id": f"{prefix}-{512 if ollama else '8f9c1e2d3b4a5968'}", "object": kind, "created": int(time.time())}
    return {**named, "model": fields["model"], **({"system_fingerprint": "fp_ollama"} if ollama else {})}


def _chat(healthy: "HealthyServer", fields: Json) -> list[Step]:
    messages = fields.get("messages") or []
    if not messages:
        raise ServerError(400, "[] is too short - 'messages'")
    calls = [] if _is_after_tool(messages) else _tool_calls(healthy, fields)
    pieces = [""] if calls else split_evenly(_text(healthy, fields), healthy.pieces)
    thinking = split_evenly(healthy.thinking, 2) if healthy.thinking else []
    usage = _counted(healthy, fields, len(thinking) + len(pieces))
    reason = "length" if healthy.is_cut else "tool_calls" if calls else "stop"
    reasoning = "reasoning" if healthy.kind == "ollama" else "reasoning_content"
    if fields.get("stream"):
        deltas = _tool_deltas(calls) if calls else _text_deltas(healthy, pieces)
        thoughts: list[Json] = [{"role": "assistant", "content": "", reasoning: piece} for piece in thinking]
        return _chat_stream(healthy, fields, [*thoughts, *deltas], reason, usage)
    thought = {reasoning: healthy.thinking} if thinking else {}
    message: Json = {"role": "assistant", "content": "".join(pieces), **thought}
    if calls:
        message = {"role": "assistant", "content": None, **thought, "tool_calls": calls}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    last = {"usage": usage, **_timings(healthy, fields)}
    whole = {**_common(healthy, fields, "chat.completion", "chatcmpl"), "choices": [choice], **last}
    return after_pause(answer(200, compact(whole) + b"\n", JSON), healthy.pause_s * len(pieces))


def _is_after_tool(messages: list[Json]) -> bool:
    """Whether a tool has answered since the last message of the assistant."""
    roles = [message.get("role") for message in messages]
    return "tool" in roles[len(roles) - roles[::-1].index("assistant") if "assistant" in roles else 0 :]


def _text(healthy: "HealthyServer", fields: Json) -> str:
    """With a JSON schema: an object with the required properties."""
    schema = ((fields.get("response_format") or {}).get("json_schema") or {}).get("schema")
    if schema is not None:
        return json.dumps(tool_arguments({"parameters": schema}), ensure_ascii=False)
    return healthy.text(last_user_text(fields["messages"]))


def _text_deltas(healthy: "HealthyServer", pieces: list[str]) -> list[Json]:
    deltas: list[Json] = [{"content": piece} for piece in pieces]
    if healthy.kind == "ollama":
        return [{"role": "assistant", **deltas[0]}, *deltas[1:]]
    return [{"role": "assistant", "content": ""}, *deltas]


def _tool_calls(healthy: "HealthyServer", fields: Json) -> list[Json]:
    """The first call has the id of a recording."""
    called = (fields.get("tools") or [])[: healthy.parallel_calls]
    return [_tool_call(tool["function"], f"call_{n or ''}k1ujbeiw") for n, tool in enumerate(called)]


def _tool_call(function: Json, call_id: str) -> Json:
    arguments = json.dumps(tool_arguments(function), ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tool_deltas(calls: list[Json]) -> list[Json]:
    deltas: list[Json] = [{"tool_calls": [{"index": number, **call}]} for number, call in enumerate(calls)]
    return [{"role": "assistant", "content": "", **deltas[0]}, *deltas[1:]]


def _chat_stream(healthy: "HealthyServer", fields: Json, deltas: list[Json], reason: str, usage: Json) -> list[Step]:
    common = _common(healthy, fields, "chat.completion.chunk", "chatcmpl")
    chunks = [{**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**common, "choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    if _wants_usage(healthy, fields):
        chunks.append({**common, "choices": [], "usage": usage, **_timings(healthy, fields)})
    return stream(sse(chunks), pause_s=healthy.pause_s)


def _completion(healthy: "HealthyServer", fields: Json) -> list[Step]:
    prompt = fields.get("prompt")
    if healthy.kind == "ollama" and not isinstance(prompt, str):
        raise ServerError(400, "json: cannot unmarshal array into Go struct field CompletionRequest.prompt of type string")
    pieces = split_evenly(healthy.text(text_of(prompt)), healthy.pieces)
    common = _common(healthy, fields, "text_completion", "cmpl")
    usage = _counted(healthy, fields, len(pieces))
    if fields.get("stream"):
        return stream(sse(_completion_chunks(healthy, fields, common, pieces, usage)), pause_s=healthy.pause_s)
    choice = {"index": 0, "text": "".join(pieces), "finish_reason": "stop"}
    whole = compact({**common, "choices": [choice], "usage": usage}) + b"\n"
    return after_pause(answer(200, whole, JSON), healthy.pause_s * len(pieces))


def _completion_chunks(healthy: "HealthyServer", fields: Json, common: Json, pieces: list[str], usage: Json) -> list[Json]:
    counted = _wants_usage(healthy, fields)
    zeros = {"usage": _usage(0, 0)} if counted and healthy.kind == "ollama" else {}
    reasons = [None] * (len(pieces) - 1) + ["stop"]
    chunks = [
        {**common, "choices": [{"index": 0, "text": piece, "finish_reason": reason}], **zeros}
        for piece, reason in zip(pieces, reasons, strict=True)
    ]
    return [*chunks, {**common, "choices": [], "usage": usage}] if counted else chunks


def _embeddings(healthy: "HealthyServer", fields: Json) -> list[Step]:
    given = fields.get("input")
    inputs = given if isinstance(given, list) else [given]
    if not inputs or inputs == [None]:
        raise ServerError(400, "invalid input")
    form = str(fields.get("encoding_format", "float")).lower()
    data = [{"object": "embedding", "embedding": _encoded(each, form), "index": n} for n, each in enumerate(inputs)]
    tokens = prompt_tokens(fields)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return answer(200, {"object": "list", "data": data, "model": fields["model"], "usage": usage}, JSON)


def _encoded(given: Any, form: str) -> list[float] | str:
    numbers = vector(given)
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode() if form == "base64" else numbers


_POSTS: dict[str, Callable[["HealthyServer", Json], list[Step]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/embeddings": _embeddings,
}
