"""The memory of a backend that loads models and throws them out: Ollama's, and llama.cpp's in router mode."""

import asyncio
import math
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

from gateway.core import strict_json
from gateway.dialects.answers import error_text, try_read
from gateway.dialects.model_entries import read_tags, whole_number
from gateway.dialects.model_names import canonical
from gateway.fleet import discovery, llama_server
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig, ModelConfig
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.jobs import TaskFailed
from gateway.fleet.llama_server import RoutedModel
from gateway.fleet.redaction import redact

HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}
LONGEST_ANSWER = 1 << 20
ASK_EVERY_S = 0.25
# Words of Ollama for a model that only makes embeddings.
DOES_NOT_GENERATE = "does not support generate"
FOREVER = -1
NOT_THERE = RoutedModel(False, 0, 0, 0)


class ModelMemory(Protocol):
    """`model` is the backend's spelling. All of it raises TaskFailed and BackendFault."""

    # What becomes of calls to a model that is unloaded.
    ends_calls: bool

    async def size_of(self, model: str) -> int | None:
        """The bytes of VRAM that a loaded model takes, 0 if that is not known; None if the model is not loaded."""

    async def load(self, model: str) -> None:
        """Returns when the model is loaded."""

    async def unload(self, model: str) -> None:
        """Asks for it; `size_of` shows when the model is gone."""

    async def calls_of(self, model: str) -> int:
        """The calls in progress, as far as the backend reports them."""


class OllamaMemory:
    """Ollama unloads a model when its calls have ended; it does not report them."""

    ends_calls = False

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def size_of(self, model: str) -> int | None:
        wanted = canonical(model).canonical
        try:
            entries = await discovery.ask(self._backend, "/api/ps", read_tags)
        except BackendFault as fault:
            # Since 0.32.10 this list waits for a load that is in progress.
            raise TaskFailed("is busy with a load: try again") if fault.reason == "head_timeout" else fault from None
        sizes = [whole_number(entry.get("size_vram")) for entry in entries if canonical(entry["name"]).canonical == wanted]
        return sizes[0] if sizes else None

    async def load(self, model: str) -> None:
        """A request without a prompt only loads. Ollama gives a load up if its connection is closed."""
        wanted = {"model": model, **load_fields(self._backend.config, model)}
        answer = await post(self._backend, "/api/generate", {**wanted, "stream": False})
        if DOES_NOT_GENERATE in answer.text:
            answer = await post(self._backend, "/api/embed", wanted)
        answer.check()

    async def unload(self, model: str) -> None:
        (await post(self._backend, "/api/generate", {"model": model, "keep_alive": 0, "stream": False})).check()

    async def calls_of(self, model: str) -> int:
        return 0


def load_fields(config: BackendConfig, model: str) -> dict[str, Any]:
    """What the operator has set for a model, so that calls find it as they need it."""
    of_model = config.models.get(canonical(model).canonical) or ModelConfig()
    fields: dict[str, Any] = {}
    if of_model.keep_alive_s is not None:
        fields["keep_alive"] = FOREVER if math.isinf(of_model.keep_alive_s) else of_model.keep_alive_s
    if isinstance(of_model.num_ctx, int):
        fields["options"] = {"num_ctx": of_model.num_ctx}
    return fields


class RouterMemory:
    """llama.cpp's router breaks off the calls of a model that it unloads, after ten seconds."""

    ends_calls = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def size_of(self, model: str) -> int | None:
        found = await self._model(model)
        return found.size if found.is_loaded else None

    async def load(self, model: str) -> None:
        """The router answers at once and loads on, whether anybody waits or not."""
        state = (await self._model(model)).state
        if state == llama_server.SLEEPING:
            # Any task wakes it, also one without work.
            (await post(self._backend, "/tokenize", {"model": model, "content": ""})).check()
        elif state not in (llama_server.LOADED, llama_server.LOADING):
            (await post(self._backend, "/models/load", {"model": model})).check()
        wait_s = self._backend.config.read_timeout_s
        try:
            async with asyncio.timeout(wait_s):
                await self._until_loaded(model)
        except TimeoutError:
            raise TaskFailed(f"has not loaded it within {wait_s:g} s") from None

    async def _until_loaded(self, model: str) -> None:
        while not (found := await self._model(model)).is_loaded:
            if found.state != llama_server.LOADING:
                raise TaskFailed("could not load it: its own log says why")
            await asyncio.sleep(ASK_EVERY_S)

    async def unload(self, model: str) -> None:
        (await post(self._backend, "/models/unload", {"model": model})).check()

    async def calls_of(self, model: str) -> int:
        """Zero if the router was started without this route."""
        try:
            return await discovery.ask(self._backend, f"/slots?model={quote(model, safe='')}&autoload=false", _busy_slots)
        except BackendFault as fault:
            if fault.reason == "bad_status":
                return 0
            raise

    async def _model(self, model: str) -> RoutedModel:
        found = await discovery.ask(self._backend, "/v1/models", llama_server.read_router)
        return found.get(canonical(model).canonical, NOT_THERE)


def _busy_slots(answer: object) -> int:
    return (
        sum(isinstance(slot, dict) and slot.get("is_processing") is True for slot in answer) if isinstance(answer, list) else 0
    )


async def memory_of(backend: Backend) -> ModelMemory | None:
    """None for a backend that has its models loaded always, or loads them by itself only. Raises BackendFault."""
    if backend.kind == "ollama":
        return OllamaMemory(backend)
    return RouterMemory(backend) if await discovery.ask(backend, "/v1/models", llama_server.read_router) else None


class Answer:
    def __init__(self, status: int, body: bytes, backend: Backend) -> None:
        self._status = status
        self.text = redact(error_text(try_read(body)), backend.config) if status != 200 else ""

    def check(self) -> None:
        if self._status != 200:
            raise TaskFailed(self.text or f"answered with status {self._status}")


async def post(backend: Backend, path: str, body: Mapping[str, Any]) -> Answer:
    """Within the time that an answer of this backend may take."""
    wait_s = backend.config.read_timeout_s
    with backend.claim():
        try:
            async with (
                asyncio.timeout(wait_s),
                backend.send("POST", path, HEADERS, strict_json.write(body), wait_s=wait_s) as upstream,
            ):
                return Answer(upstream.status, await upstream.read_whole(LONGEST_ANSWER), backend)
        except TimeoutError:
            raise BackendFault("head_timeout", f"no answer within {wait_s:g} s") from None
