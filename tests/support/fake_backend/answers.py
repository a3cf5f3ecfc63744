"""What a healthy server answers: Ollama's own routes, and those of the servers that speak OpenAI's language."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tests.support.fake_backend import openai_routes
from tests.support.fake_backend.content import (
    Asked,
    Refused,
    canonical,
    cut,
    paused,
    prompt_tokens,
    said,
    tool_arguments,
    vector,
)
from tests.support.fake_backend.scripts import NDJSON, PLAIN, Received, Step, Steps, answer, ndjson, stream

Kind = Literal["ollama", "openai"]
Route = Callable[["Healthy", Asked], list[Step]]

VERSION = "0.12.6"
MODIFIED = "2026-05-04T17:37:44.706015396-07:00"
SIZE = 2019393189
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "3.2B",
    "quantization_level": "Q4_K_M",
}


@dataclass
class Healthy:
    """Its fields may be changed at any time; the next answer follows them."""

    kind: Kind
    models: list[str]
    name: str
    pieces: int
    pause_s: float
    token: str | None
    token_header: str
    blobs: set[str] = field(default_factory=set)
    # What it says it had cached of a prompt; without one it says nothing of the sort.
    cached: Callable[[Asked], object] | None = None

    def __call__(self, request: Received) -> Steps:
        if not self._admits(request):
            return answer(401, {"error": "Unauthorized"})
        if self.kind == "openai":
            return openai_routes.respond(self, request)
        return _respond(self, request)

    def has(self, model: str) -> bool:
        return canonical(model) in map(canonical, self.models)

    def text(self, heard: str) -> str:
        return f"{self.name} heard: {heard}"

    def _admits(self, request: Received) -> bool:
        guarded = self.kind == "ollama" or request.path.startswith("/v1")
        if self.token is None or not guarded:
            return True
        scheme = "Bearer " if self.token_header.lower() == "authorization" else ""
        return request.header(self.token_header) == scheme + self.token


def _respond(healthy: Healthy, request: Received) -> list[Step]:
    if request.path.startswith("/v1/"):
        return openai_routes.respond(healthy, request)
    if request.path.startswith("/api/blobs/sha256:"):
        return _blob(healthy, request)
    methods = _ROUTES.get(request.path)
    if methods is None:
        return answer(404, b"404 page not found", PLAIN)
    if request.method not in methods:
        return answer(405, b"405 method not allowed", PLAIN)
    try:
        return methods[request.method](healthy, _asked(request))
    except Refused as refused:
        return answer(refused.status, {"error": str(refused)})


def _asked(request: Received) -> Asked:
    if request.method in ("GET", "HEAD"):
        return {}
    if not request.body:
        raise Refused(400, "missing request body")
    try:
        asked = json.loads(request.body)
    except ValueError:
        raise Refused(400, "invalid character 'x' looking for beginning of value") from None
    if not isinstance(asked, dict):
        raise Refused(400, "json: cannot unmarshal array into Go value of type api.ChatRequest")
    return asked


def _known(healthy: Healthy, asked: Asked, unnamed: tuple[int, str], words: str) -> str:
    model = asked.get("model") or asked.get("name") or ""
    if not model:
        raise Refused(*unnamed)
    if not healthy.has(model):
        raise Refused(404, words.format(model))
    return str(model)


REQUIRED = (400, "model is required")
NOT_FOUND = "model '{}' not found"
TRY_PULLING = 'model "{}" not found, try pulling it first'


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "789Z"


def _listed(healthy: Healthy, asked: Asked) -> list[Step]:
    return answer(200, {"models": [_entry(model) for model in healthy.models]})


def _entry(model: str) -> dict[str, Any]:
    return {
        "name": canonical(model),
        "model": canonical(model),
        "modified_at": MODIFIED,
        "size": SIZE,
        "digest": hashlib.sha256(canonical(model).encode()).hexdigest(),
        "details": {**DETAILS, "context_length": 131072, "embedding_length": 3072},
        "capabilities": ["completion", "tools"],
    }


def _running(healthy: Healthy, asked: Asked) -> list[Step]:
    loaded = {"expires_at": "2318-08-21T18:05:00.0-07:00", "size_vram": SIZE, "context_length": 4096}
    keys = ("name", "model", "size", "digest")
    entries = [_entry(model) for model in healthy.models]
    listed = [{**{key: entry[key] for key in keys}, "details": DETAILS, **loaded} for entry in entries]
    return answer(200, {"models": listed})


def _show(healthy: Healthy, asked: Asked) -> list[Step]:
    model = asked.get("model") or asked.get("name") or ""
    if not model:
        raise Refused(*REQUIRED)
    if not healthy.has(model):
        raise Refused(404, NOT_FOUND.format(canonical(model)))
    shown = {
        "license": "LLAMA 3.2 COMMUNITY LICENSE AGREEMENT",
        "modelfile": f"FROM /usr/share/ollama/.ollama/models/blobs/sha256-{_entry(model)['digest']}\n",
        "parameters": 'stop                           "<|eot_id|>"',
        "template": "{{ .Prompt }}",
        "details": DETAILS,
        "model_info": {
            "general.architecture": "llama",
            "general.basename": "Llama-3.2",
            "llama.context_length": 131072,
            "tokenizer.ggml.tokens": [],
        },
        "capabilities": ["completion", "tools"],
        "modified_at": MODIFIED,
    }
    return answer(200, shown)


def _chat(healthy: Healthy, asked: Asked) -> list[Step]:
    model = _known(healthy, asked, REQUIRED, NOT_FOUND)
    messages = asked.get("messages") or []
    if not messages:
        return _loaded(asked, {"message": {"role": "assistant", "content": ""}})
    if asked.get("tools") and messages[-1].get("role") != "tool":
        parts = [{"message": {"role": "assistant", "content": "", "tool_calls": [_tool_call(asked)]}}]
    else:
        text = healthy.text(said(messages))
        parts = [{"message": {"role": "assistant", "content": piece}} for piece in cut(text, healthy.pieces)]
    return _generated(healthy, asked, model, parts, {"message": {"role": "assistant", "content": ""}})


def _tool_call(asked: Asked) -> dict[str, Any]:
    function = asked["tools"][0]["function"]
    return {"id": "call_k1ujbeiw", "function": {"index": 0, "name": function["name"], "arguments": tool_arguments(function)}}


def _generate(healthy: Healthy, asked: Asked) -> list[Step]:
    model = _known(healthy, asked, (404, "model '' not found"), NOT_FOUND)
    if not asked.get("prompt"):
        return _loaded(asked, {"response": ""})
    parts = [{"response": piece} for piece in cut(healthy.text(asked["prompt"]), healthy.pieces)]
    return _generated(healthy, asked, model, parts, {"response": "", "context": [128006, 882, 128007, 271]})


def _loaded(asked: Asked, nothing: dict[str, Any]) -> list[Step]:
    reason = "unload" if asked.get("keep_alive") in (0, "0", "0s") else "load"
    return answer(200, {"model": asked["model"], "created_at": _now(), **nothing, "done": True, "done_reason": reason})


def _generated(healthy: Healthy, asked: Asked, model: str, parts: list[Asked], nothing: Asked) -> list[Step]:
    head = {"model": model, "created_at": _now()}
    last: Asked = {
        "done": True,
        "done_reason": "stop",
        "total_duration": 512345678,
        "load_duration": 41234567,
        "prompt_eval_count": prompt_tokens(asked),
        "prompt_eval_duration": 120000000,
        "eval_count": len(parts),
        "eval_duration": 60000000,
    }
    if healthy.cached is not None:
        last["prompt_eval_cached_count"] = healthy.cached(asked)
    if asked.get("stream") is False:
        return paused(answer(200, {**head, **nothing, **_joined(parts), **last}), healthy.pause_s * len(parts))
    records = [{**head, **part, "done": False} for part in parts]
    return stream(ndjson([*records, {**head, **nothing, **last}]), NDJSON, healthy.pause_s)


def _joined(parts: list[Asked]) -> Asked:
    if "response" in parts[0]:
        return {"response": "".join(part["response"] for part in parts)}
    return {"message": {**parts[0]["message"], "content": "".join(part["message"]["content"] for part in parts)}}


def _embed(healthy: Healthy, asked: Asked) -> list[Step]:
    model = _known(healthy, asked, (404, "model '' not found"), TRY_PULLING)
    given = asked.get("input") or []
    inputs = [given] if isinstance(given, str) else given
    times = {"total_duration": 14143917, "load_duration": 1019500}
    counted = {"prompt_eval_count": prompt_tokens(asked)} if inputs else {}
    return answer(200, {"model": model, "embeddings": [vector(each) for each in inputs], **times, **counted})


def _embeddings(healthy: Healthy, asked: Asked) -> list[Step]:
    _known(healthy, asked, REQUIRED, TRY_PULLING)
    return answer(200, {"embedding": vector(asked["prompt"]) if asked.get("prompt") else []})


def _pull(healthy: Healthy, asked: Asked) -> list[Step]:
    model = asked.get("model") or asked.get("name") or ""
    digest = hashlib.sha256(model.encode()).hexdigest()
    layer = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": SIZE}
    if not healthy.has(model):
        healthy.models.append(canonical(model))
    records: list[Asked] = [
        {"status": "pulling manifest"},
        layer,
        {**layer, "completed": SIZE // 2},
        {**layer, "completed": SIZE},
        *({"status": words} for words in ("verifying sha256 digest", "writing manifest", "success")),
    ]
    return _progress(healthy, asked, records)


def _push(healthy: Healthy, asked: Asked) -> list[Step]:
    _known(healthy, asked, REQUIRED, NOT_FOUND)
    return _progress(healthy, asked, [{"status": words} for words in ("retrieving manifest", "pushing manifest", "success")])


def _create(healthy: Healthy, asked: Asked) -> list[Step]:
    model = asked.get("model") or asked.get("name") or ""
    if not healthy.has(model):
        healthy.models.append(canonical(model))
    return _progress(healthy, asked, [{"status": words} for words in ("parsing GGUF", "writing manifest", "success")])


def _progress(healthy: Healthy, asked: Asked, records: list[dict[str, Any]]) -> list[Step]:
    if asked.get("stream") is False:
        return answer(200, records[-1])
    return stream(ndjson(records), NDJSON, healthy.pause_s)


def _copy(healthy: Healthy, asked: Asked) -> list[Step]:
    source = asked.get("source", "")
    if not isinstance(source, str) or not isinstance(asked.get("destination"), str):
        raise Refused(400, "source and destination are required")
    if not healthy.has(source):
        raise Refused(404, f'model "{source}" not found')
    healthy.models.append(canonical(asked["destination"]))
    return answer(200, b"", "")


def _delete(healthy: Healthy, asked: Asked) -> list[Step]:
    gone = canonical(_known(healthy, asked, REQUIRED, NOT_FOUND))
    healthy.models[:] = [model for model in healthy.models if canonical(model) != gone]
    return answer(200, b"", "")


def _blob(healthy: Healthy, request: Received) -> list[Step]:
    digest = request.path.removeprefix("/api/blobs/")
    if request.method == "HEAD":
        return answer(200 if digest in healthy.blobs else 404, b"", "")
    if request.method != "POST":
        return answer(405, b"405 method not allowed", PLAIN)
    if digest in healthy.blobs:
        return answer(200, b"", "")
    if digest != "sha256:" + hashlib.sha256(request.body).hexdigest():
        return answer(400, {"error": "digest mismatch"})
    healthy.blobs.add(digest)
    return answer(201, b"", "")


def _alive(healthy: Healthy, asked: Asked) -> list[Step]:
    return answer(200, b"Ollama is running", "text/plain; charset=utf-8")


def _version(healthy: Healthy, asked: Asked) -> list[Step]:
    return answer(200, {"version": VERSION})


_ROUTES: dict[str, dict[str, Route]] = {
    "/": {"GET": _alive, "HEAD": _alive},
    "/api/version": {"GET": _version, "HEAD": _version},
    "/api/tags": {"GET": _listed, "HEAD": _listed},
    "/api/ps": {"GET": _running},
    "/api/show": {"POST": _show},
    "/api/chat": {"POST": _chat},
    "/api/generate": {"POST": _generate},
    "/api/embed": {"POST": _embed},
    "/api/embeddings": {"POST": _embeddings},
    "/api/pull": {"POST": _pull},
    "/api/push": {"POST": _push},
    "/api/create": {"POST": _create},
    "/api/copy": {"POST": _copy},
    "/api/delete": {"DELETE": _delete},
}
