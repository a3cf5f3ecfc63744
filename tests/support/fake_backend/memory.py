"""The memory of a fake backend that loads models and throws them out: Ollama's, and llama.cpp's in router mode."""

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.support.fake_backend.content import Json, after_pause
from tests.support.fake_backend.scripts import Received, Step, answer

if TYPE_CHECKING:
    from tests.support.fake_backend.answers import HealthyServer

JSON = "application/json; charset=utf-8"
ROUTED_SIZE = 6_114_816
ROUTER_PATHS = ("/models", "/v1/models", "/models/load", "/models/unload", "/slots", "/tokenize")


@dataclass
class Memory:
    """Which models are loaded, by the names under which they are listed. Models in `busy` have calls and stay until these end;
    those in `broken` cannot be loaded."""

    load_s: float = 0.0
    loaded: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    embedding: set[str] = field(default_factory=set)
    # A router answers before the model is loaded.
    ready_at: dict[str, float] = field(default_factory=dict)
    leaving: set[str] = field(default_factory=set)
    # Of a router: their memory was freed because nobody called them.
    asleep: set[str] = field(default_factory=set)

    def load(self, model: str) -> float:
        """Returns the seconds that it takes."""
        self.leaving.discard(model)
        seconds = 0.0 if model in self.loaded else self.load_s
        self.loaded.add(model)
        return seconds

    def unload(self, model: str) -> None:
        self.leaving.add(model)
        self._expire()

    def now(self) -> set[str]:
        self._expire()
        return self.loaded

    def _expire(self) -> None:
        gone = self.leaving - self.busy
        self.loaded -= gone
        self.leaving -= gone

    def status(self, model: str) -> str:
        """As a router reports it."""
        if model not in self.now():
            return "unloaded"
        if model in self.asleep:
            return "sleeping"
        return "loading" if time.monotonic() < self.ready_at.get(model, 0.0) else "loaded"


def router(healthy: "HealthyServer", request: Received) -> list[Step]:
    """One of ROUTER_PATHS of llama.cpp in router mode."""
    assert healthy.memory is not None
    if request.path == "/slots":
        model = request.target.partition("model=")[2].partition("&")[0]
        return answer(200, [{"id": 0, "n_ctx": 4096, "is_processing": model in healthy.memory.busy}], JSON)
    if request.method == "GET":
        return answer(200, {"data": [_entry(healthy.memory, model) for model in healthy.models], "object": "list"}, JSON)
    model = json.loads(request.body).get("model", "")
    if request.path == "/tokenize":
        healthy.memory.asleep.discard(model)
        return after_pause(answer(200, {"tokens": []}, JSON), healthy.memory.load_s)
    is_running = model in healthy.memory.now()
    if request.path == "/models/load":
        return _load(healthy, model, is_running=is_running)
    if not is_running:
        return _refused("model is not running" if model in healthy.models else "model is not found")
    healthy.memory.unload(model)
    return answer(200, {"success": True}, JSON)


def _load(healthy: "HealthyServer", model: str, *, is_running: bool) -> list[Step]:
    assert healthy.memory is not None
    if model not in healthy.models:
        return answer(404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}, JSON)
    if is_running:
        return _refused("model is already running")
    if model not in healthy.memory.broken:
        healthy.memory.ready_at[model] = time.monotonic() + healthy.memory.load(model)
    return answer(200, {"success": True}, JSON)


def _refused(words: str) -> list[Step]:
    return answer(400, {"error": {"code": 400, "message": words, "type": "invalid_request_error"}}, JSON)


def _entry(memory: Memory, model: str) -> Json:
    status: Json = {"value": memory.status(model), "args": ["llama-server", "--alias", model]}
    if model in memory.broken:
        status |= {"failed": True, "exit_code": 1}
    meta = {"meta": {"n_ctx": 4096, "size": ROUTED_SIZE}} if status["value"] == "loaded" else {}
    created = int(time.time())
    return {"id": model, "object": "model", "owned_by": "llamacpp", "created": created, "status": status, **meta}
