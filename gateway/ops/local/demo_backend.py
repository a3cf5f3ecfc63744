"""A small backend for a first try without a model server: it repeats the prompt and states that it is not a model."""

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.edge.workers import end_with_parent

CHAT_MODEL, EMBEDDING_MODEL = "demonstration-no-real-model:latest", "demonstration-no-real-embeddings:latest"
PAUSE_S = 0.03
DIMENSIONS = 8


def answer_to(prompt: str) -> list[str]:
    text = f"This is the demonstration backend, not a model: it only repeats. You said: {prompt or '(nothing)'}"
    return [word + " " for word in text.split()]


def entry(name: str, capability: str) -> dict[str, Any]:
    details = {"parent_model": "", "format": "none", "family": "demonstration", "families": ["demonstration"]}
    return {
        "name": name,
        "model": name,
        "modified_at": "2026-01-01T00:00:00Z",
        "size": 0,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": {**details, "parameter_size": "0B", "quantization_level": "none"},
        "capabilities": [capability],
    }


ENTRIES = [entry(CHAT_MODEL, "completion"), entry(EMBEDDING_MODEL, "embedding")]


def prompt_in(body: dict[str, Any]) -> str:
    messages = body.get("messages") or [{"content": body.get("prompt") or ""}]
    content = messages[-1].get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)


async def body_of(request: Request) -> dict[str, Any]:
    """Whether a route is there is asked with a body that is no object; only the status matters then."""
    body = await request.json()
    if not isinstance(body, dict):
        raise KeyError("model")
    return body


async def tags(request: Request) -> Response:
    return JSONResponse({"models": ENTRIES})


async def running_models(request: Request) -> Response:
    return JSONResponse({"models": []})


async def version(request: Request) -> Response:
    return JSONResponse({"version": "0.12.0"})


async def show(request: Request) -> Response:
    return JSONResponse({"details": ENTRIES[0]["details"], "model_info": {}, "capabilities": ["completion"]})


async def alive(request: Request) -> Response:
    return PlainTextResponse("Ollama is running")


async def native(request: Request) -> Response:
    body = await body_of(request)
    model, words = body["model"], answer_to(prompt_in(body))
    is_chat = request.url.path == "/api/chat"

    def record(text: str, **more: Any) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if is_chat else {"response": text}
        return {"model": model, "created_at": "2026-01-01T00:00:00Z", **content, "done": False, **more}

    end = {
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": len(prompt_in(body).split()) or 1,
        "eval_count": len(words),
    }
    if body.get("stream") is False:
        return JSONResponse(record("".join(words).strip(), **end))

    async def records() -> AsyncIterator[bytes]:
        for word in words:
            yield json.dumps(record(word)).encode() + b"\n"
            await asyncio.sleep(PAUSE_S)
        yield json.dumps(record("", **end)).encode() + b"\n"

    return StreamingResponse(records(), media_type="application/x-ndjson")


async def completions(request: Request) -> Response:
    body = await body_of(request)
    words = answer_to(prompt_in(body))
    usage = {"prompt_tokens": len(prompt_in(body).split()) or 1, "completion_tokens": len(words)}
    usage["total_tokens"] = sum(usage.values())
    head = {"id": "chatcmpl-demonstration", "created": 1767225600, "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": "".join(words).strip()}
        choice = {"index": 0, "message": message, "text": message["content"], "finish_reason": "stop"}
        return JSONResponse({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return (
            b"data: " + json.dumps({**head, "object": "chat.completion.chunk", "choices": choices, **more}).encode() + b"\n\n"
        )

    async def events() -> AsyncIterator[bytes]:
        for word in words:
            yield event([{"index": 0, "delta": {"content": word}, "text": word, "finish_reason": None}])
            await asyncio.sleep(PAUSE_S)
        yield event([{"index": 0, "delta": {}, "text": "", "finish_reason": "stop"}])
        if (body.get("stream_options") or {}).get("include_usage"):
            yield event([], usage=usage)
        yield b"data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


def vector(text: str) -> list[float]:
    digest = hashlib.sha256(text.encode()).digest()
    return [byte / 255 for byte in digest[:DIMENSIONS]]


async def embed(request: Request) -> Response:
    body = await body_of(request)
    asked = body.get("input", body.get("prompt", ""))
    texts = asked if isinstance(asked, list) else [asked]
    vectors = [vector(str(text)) for text in texts]
    if request.url.path == "/api/embeddings":
        return JSONResponse({"embedding": vectors[0]})
    if request.url.path == "/api/embed":
        return JSONResponse({"model": body["model"], "embeddings": vectors, "prompt_eval_count": len(texts)})
    data = [{"object": "embedding", "embedding": found, "index": index} for index, found in enumerate(vectors)]
    usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
    return JSONResponse({"object": "list", "data": data, "model": body["model"], "usage": usage})


async def incomplete(request: Request, missing: Exception) -> Response:
    """Probes send no field that could be answered."""
    return JSONResponse({"error": f"{missing} is missing"}, 400)


app = Starlette(
    exception_handlers={KeyError: incomplete},
    routes=[
        Route("/", alive),
        Route("/api/version", version),
        Route("/api/tags", tags),
        Route("/api/ps", running_models),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/chat", native, methods=["POST"]),
        Route("/api/generate", native, methods=["POST"]),
        Route("/api/embed", embed, methods=["POST"]),
        Route("/api/embeddings", embed, methods=["POST"]),
        Route("/v1/chat/completions", completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/embeddings", embed, methods=["POST"]),
    ],
)


def serve(descriptor: int, parent: int) -> None:
    end_with_parent(parent)
    with socket.socket(fileno=descriptor) as listener:
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run([listener])
