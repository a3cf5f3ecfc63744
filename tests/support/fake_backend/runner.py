"""Plays how Ollama loads a model, keeps it and loads it again: `needsReload` and `useLoadedRunner` in its server/sched.go."""

import threading
from dataclasses import dataclass, field
from typing import Any

from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Received, Step, Steps, answer

NATIVE = ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")
WITHOUT_OPTIONS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
DEFAULT_CONTEXT, TRAINED_CONTEXT = 4096, 131072
# What a request that does not say so is loaded with.
USUAL: dict[str, Any] = {
    "num_ctx": DEFAULT_CONTEXT,
    "num_batch": 512,
    "num_gpu": -1,
    "main_gpu": None,
    "use_mmap": None,
    "num_thread": 0,
    "draft_num_predict": 0,
    "shift": True,
}


@dataclass
class PlayedRunner:
    """The one model of a backend; `loads` has the options of each load."""

    backend: FakeBackend
    loads: list[dict[str, Any]] = field(default_factory=list)
    loaded: dict[str, Any] | None = None
    keep_alive: Any = None
    unloads: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        for path in (*NATIVE, *WITHOUT_OPTIONS):
            self.backend.play(path, self._answer)
        self.backend.play("/api/ps", self._running)

    def _answer(self, request: Received) -> Steps:
        body = request.json if request.path in NATIVE else {}
        options = {**(body.get("options") or {}), **{name: body[name] for name in ("shift",) if name in body}}
        wanted = {name: usual if options.get(name) is None else options[name] for name, usual in USUAL.items()}
        wanted["num_ctx"] = min(wanted["num_ctx"], TRAINED_CONTEXT)
        kept = body.get("keep_alive")
        with self._lock:
            self.keep_alive = self.keep_alive if kept is None else kept
            if kept == 0 and not (body.get("messages") or body.get("prompt") or body.get("input")):
                self.loaded, self.unloads = None, self.unloads + 1
            elif wanted != self.loaded:
                self.loads.append(wanted)
                self.loaded = wanted
        return self.backend.healthy(request)

    def _running(self, request: Received) -> list[Step]:
        loaded = self.loaded
        if loaded is None:
            return answer(200, {"models": []})
        entry = {"name": self.backend.models[0], "model": self.backend.models[0], "size": 7, "size_vram": 7, "digest": "d"}
        return answer(200, {"models": [{**entry, "details": {}, "context_length": loaded["num_ctx"]}]})
