"""The answers of a healthy server: Ollama's own routes; those of the OpenAI dialect are in openai_routes."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tests.support.fake_backend import native_messages, native_responses, openai_routes
from tests.support.fake_backend.content import (
    Json,
    ServerError,
    after_pause,
    canonical,
    last_user_text,
    prompt_tokens,
    split_evenly,
    tool_arguments,
    vector,
)
from tests.support.fake_backend.memory import ROUTER_PATHS, Memory, router
from tests.support.fake_backend.scripts import NDJSON, PLAIN, Received, Step, Steps, answer, ndjson, stream

Kind = Literal["ollama", "openai"]
Route = Callable[["HealthyServer", Json], list[Step]]

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
class HealthyServer:
    """Its fields may be changed at any time, for the next answers."""

    kind: Kind
    models: list[str]
    name: str
    pieces: int
    pause_s: float
    token: str | None
    token_header: str
    blobs: set[str] = field(default_factory=set)
    # The number of cached prompt tokens that it reports; None reports nothing.
    cached: Callable[[Json], object] | None = None
    # The seconds that it reports for loading, the prompt and the answer: as Ollama, or for kind openai as llama.cpp.
    durations: Callable[[Json], tuple[float, float, float]] | None = None
    # Whether it has the Messages and Responses APIs beside its own: as Ollama has them, or as llama.cpp for kind openai.
    is_native: bool = False
    thinking: str = ""
    parallel_calls: int = 1
    # Whether its answers end at their token limit.
    is_cut: bool = False
    # None: it has all its models loaded, always. With a memory, one of kind openai is llama.cpp in router mode.
    memory: Memory | None = None

    def __call__(self, request: Received) -> Steps:
        if not self._admits(request):
            return answer(401, {"error": "Unauthorized"})
        if self.is_native and request.method == "POST" and (native := self._native(request.path)):
            return native(self, request)
        if self.kind == "openai":
            is_of_router = self.memory is not None and request.path in ROUTER_PATHS
            return router(self, request) if is_of_router else openai_routes.respond(self, request)
        return _respond(self, request)

    def has(self, model: str) -> bool:
        return canonical(model) in map(canonical, self.models)

    def load(self, model: str) -> float:
        """Loads a model if it is not; returns the seconds that it takes."""
        return self.memory.load(canonical(model)) if self.memory else 0.0

    def text(self, prompt: str) -> str:
        return f"{self.name} heard: {prompt}"

    def _native(self, path: str) -> Callable[["HealthyServer", Received], list[Step]] | None:
        """Ollama cannot count tokens."""
        routes = {"/v1/messages": native_messages.respond, "/v1/responses": native_responses.respond}
        counts = {
            "/v1/messages/count_tokens": native_messages.respond,
            "/v1/responses/input_tokens": native_responses.respond,
        }
        return (routes if self.kind == "ollama" else {**routes, **counts}).get(path)

    def _admits(self, request: Received) -> bool:
        guarded = self.kind == "ollama" or request.path.startswith("/v1")
        if self.token is None or not guarded:
            return True
        scheme = "Bearer " if self.token_header.lower() == "authorization" else ""
        return request.header(self.token_header) == scheme + self.token


def _respond(healthy: HealthyServer, request: Received) -> list[Step]:
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
        return methods[request.method](healthy, _fields_of(request))
    except ServerError as refused:
        return answer(refused.status, {"error": str(refused)})


def _fields_of(request: Received) -> Json:
    if request.method in ("GET", "HEAD"):
        return {}
    if not request.body:
        raise ServerError(400, "missing request body")
    try:
        fields = json.loads(request.body)
    except ValueError:
        raise ServerError(400, "invalid character 'x' looking for beginning of value") from None
    if not isinstance(fields, dict):
        raise ServerError(400, "json: cannot unmarshal array into Go value of type api.ChatRequest")
    return fields


def _known(healthy: HealthyServer, fields: Json, unnamed: tuple[int, str], words: str) -> str:
    model = fields.get("model") or fields.get("name") or ""
    if not model:
        raise ServerError(*unnamed)
    if not healthy.has(model):
        raise ServerError(404, words.format(model))
    return str(model)


REQUIRED = (400, "model is required")
NOT_FOUND = "model '{}' not found"
TRY_PULLING = 'model "{}" not found, try pulling it first'


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "789Z"


def _listed(healthy: HealthyServer, fields: Json) -> list[Step]:
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


def _running(healthy: HealthyServer, fields: Json) -> list[Step]:
    loaded = {"expires_at": "2318-08-21T18:05:00.0-07:00", "size_vram": SIZE, "context_length": 4096}
    keys = ("name", "model", "size", "digest")
    resident = [model for model in healthy.models if healthy.memory is None or canonical(model) in healthy.memory.now()]
    entries = [_entry(model) for model in resident]
    listed = [{**{key: entry[key] for key in keys}, "details": DETAILS, **loaded} for entry in entries]
    return answer(200, {"models": listed})


def _show(healthy: HealthyServer, fields: Json) -> list[Step]:
    model = fields.get("model") or fields.get("name") or ""
    if not model:
        raise ServerError(*REQUIRED)
    if not healthy.has(model):
        raise ServerError(404, NOT_FOUND.format(canonical(model)))
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


def _chat(healthy: HealthyServer, fields: Json) -> list[Step]:
    model = _known(healthy, fields, REQUIRED, NOT_FOUND)
    messages = fields.get("messages") or []
    if not messages:
        return _loaded(healthy, fields, {"message": {"role": "assistant", "content": ""}})
    load_s = healthy.load(model)
    if fields.get("tools") and messages[-1].get("role") != "tool":
        parts = [{"message": {"role": "assistant", "content": "", "tool_calls": [_tool_call(fields)]}}]
    else:
        text = healthy.text(last_user_text(messages))
        parts = [{"message": {"role": "assistant", "content": piece}} for piece in split_evenly(text, healthy.pieces)]
    return after_pause(_generated(healthy, fields, model, parts, {"message": {"role": "assistant", "content": ""}}), load_s)


def _tool_call(fields: Json) -> dict[str, Any]:
    function = fields["tools"][0]["function"]
    return {"id": "call_k1ujbeiw", "function": {"index": 0, "name": function["name"], "arguments": tool_arguments(function)}}


def _generate(healthy: HealthyServer, fields: Json) -> list[Step]:
    model = _known(healthy, fields, (404, "model '' not found"), NOT_FOUND)
    if not fields.get("prompt"):
        return _loaded(healthy, fields, {"response": ""})
    load_s = healthy.load(model)
    parts = [{"response": piece} for piece in split_evenly(healthy.text(fields["prompt"]), healthy.pieces)]
    nothing = {"response": "", "context": [128006, 882, 128007, 271]}
    return after_pause(_generated(healthy, fields, model, parts, nothing), load_s)


def _loaded(healthy: HealthyServer, fields: Json, nothing: dict[str, Any]) -> list[Step]:
    """Loads or unloads a model; the answer to the former comes when it is loaded."""
    model, seconds = fields["model"], 0.0
    reason = "unload" if fields.get("keep_alive") in (0, "0", "0s") else "load"
    if reason == "load":
        if healthy.memory and canonical(model) in healthy.memory.embedding:
            raise ServerError(400, f'"{model}" does not support generate')
        if healthy.memory and canonical(model) in healthy.memory.broken:
            raise ServerError(500, "llama-server process has terminated: signal: aborted")
        seconds = healthy.load(model)
    elif healthy.memory:
        healthy.memory.unload(canonical(model))
    record = {"model": model, "created_at": _now(), **nothing, "done": True, "done_reason": reason}
    return after_pause(answer(200, record), seconds)


def _generated(healthy: HealthyServer, fields: Json, model: str, parts: list[Json], nothing: Json) -> list[Step]:
    head = {"model": model, "created_at": _now()}
    last: Json = {
        "done": True,
        "done_reason": "stop",
        "total_duration": 512345678,
        "load_duration": 41234567,
        "prompt_eval_count": prompt_tokens(fields),
        "prompt_eval_duration": 120000000,
        "eval_count": len(parts),
        "eval_duration": 60000000,
    }
    if healthy.durations is not None:
        load, prefill, decode = (round(seconds * 10**9) for seconds in healthy.durations(fields))
        last |= {"load_duration": load, "prompt_eval_duration": prefill, "eval_duration": decode}
    if healthy.cached is not None:
        last["prompt_eval_cached_count"] = healthy.cached(fields)
    if fields.get("stream") is False:
        return after_pause(answer(200, {**head, **nothing, **_joined(parts), **last}), healthy.pause_s * len(parts))
    records = [{**head, **part, "done": False} for part in parts]
    return stream(ndjson([*records, {**head, **nothing, **last}]), NDJSON, healthy.pause_s)


def _joined(parts: list[Json]) -> Json:
    if "response" in parts[0]:
        return {"response": "".join(part["response"] for part in parts)}
    return {"message": {**parts[0]["message"], "content": "".join(part["message"]["content"] for part in parts)}}


def _embed(healthy: HealthyServer, fields: Json) -> list[Step]:
    model = _known(healthy, fields, (404, "model '' not found"), TRY_PULLING)
    given = fields.get("input") or []
    inputs = [given] if isinstance(given, str) else given
    times = {"total_duration": 14143917, "load_duration": 1019500}
    counted = {"prompt_eval_count": prompt_tokens(fields)} if inputs else {}
    record = {"model": model, "embeddings": [vector(each) for each in inputs], **times, **counted}
    return after_pause(answer(200, record), healthy.load(model))


def _embeddings(healthy: HealthyServer, fields: Json) -> list[Step]:
    _known(healthy, fields, REQUIRED, TRY_PULLING)
    return answer(200, {"embedding": vector(fields["prompt"]) if fields.get("prompt") else []})


def _pull(healthy: HealthyServer, fields: Json) -> list[Step]:
    model = fields.get("model") or fields.get("name") or ""
    digest = hashlib.sha256(model.encode()).hexdigest()
    layer = {"status": f"pulling {digest[:12]}", "digest": f"sha256:{digest}", "total": SIZE}
    if not healthy.has(model):
        healthy.models.append(canonical(model))
    records: list[Json] = [
        {"status": "pulling manifest"},
        layer,
        {**layer, "completed": SIZE // 2},
        {**layer, "completed": SIZE},
        *({"status": words} for words in ("verifying sha256 digest", "writing manifest", "success")),
    ]
    return _progress(healthy, fields, records)


def _push(healthy: HealthyServer, fields: Json) -> list[Step]:
    _known(healthy, fields, REQUIRED, NOT_FOUND)
    return _progress(healthy, fields, [{"status": words} for words in ("retrieving manifest", "pushing manifest", "success")])


def _create(healthy: HealthyServer, fields: Json) -> list[Step]:
    model = fields.get("model") or fields.get("name") or ""
    if not healthy.has(model):
        healthy.models.append(canonical(model))
    return _progress(healthy, fields, [{"status": words} for words in ("parsing GGUF", "writing manifest", "success")])


def _progress(healthy: HealthyServer, fields: Json, records: list[dict[str, Any]]) -> list[Step]:
    if fields.get("stream") is False:
        return answer(200, records[-1])
    return stream(ndjson(records), NDJSON, healthy.pause_s)


def _copy(healthy: HealthyServer, fields: Json) -> list[Step]:
    source = fields.get("source", "")
    if not isinstance(source, str) or not isinstance(fields.get("destination"), str):
        raise ServerError(400, "source and destination are required")
    if not healthy.has(source):
        raise ServerError(404, f'model "{source}" not found')
    healthy.models.append(canonical(fields["destination"]))
    return answer(200, b"", "")


def _delete(healthy: HealthyServer, fields: Json) -> list[Step]:
    gone = canonical(_known(healthy, fields, REQUIRED, NOT_FOUND))
    healthy.models[:] = [model for model in healthy.models if canonical(model) != gone]
    return answer(200, b"", "")


def _blob(healthy: HealthyServer, request: Received) -> list[Step]:
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


def _alive(healthy: HealthyServer, fields: Json) -> list[Step]:
    return answer(200, b"Ollama is running", "text/plain; charset=utf-8")


def _version(healthy: HealthyServer, fields: Json) -> list[Step]:
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
