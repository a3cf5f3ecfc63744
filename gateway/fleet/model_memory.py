"""The memory of a backend that loads models and throws them out: Ollama's, and llama.cpp's in router mode."""

import asyncio
from collections.abc import Mapping
from typing import Any, Protocol
from urllib.parse import quote

from gateway.core import strict_json
from gateway.dialects.answers import error_text, try_read
from gateway.dialects.model_entries import read_tags, whole_number
from gateway.dialects.model_names import canonical
from gateway.fleet import discovery
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.jobs import TaskFailed
from gateway.fleet.redaction import redact

HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}
LONGEST_ANSWER = 1 << 20
ASK_EVERY_S = 0.25
# Words of Ollama for a model that only makes embeddings.
DOES_NOT_GENERATE = "does not support generate"
# States of a model in llama.cpp's router; one that sleeps wakes at its next call.
LOADED, LOADING = frozenset({"loaded", "sleeping"}), "loading"


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
        entries = await discovery.ask(self._backend, "/api/ps", read_tags)
        sizes = [whole_number(entry.get("size_vram")) for entry in entries if canonical(entry["name"]).canonical == wanted]
        return sizes[0] if sizes else None

    async def load(self, model: str) -> None:
        """A request without a prompt only loads. Ollama gives a load up if its connection is closed."""
        asked = {"model": model, "stream": False}
        answer = await post(self._backend, "/api/generate", asked)
        if DOES_NOT_GENERATE in answer.text:
            answer = await post(self._backend, "/api/embed", {"model": model})
        answer.check()

    async def unload(self, model: str) -> None:
        (await post(self._backend, "/api/generate", {"model": model, "keep_alive": 0, "stream": False})).check()

    async def calls_of(self, model: str) -> int:
        return 0


class RouterMemory:
    """llama.cpp's router breaks off the calls of a model that it unloads, after ten seconds."""

    ends_calls = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def size_of(self, model: str) -> int | None:
        status = await self._status(model)
        return 0 if status.get("value") in (*LOADED, LOADING) else None

    async def load(self, model: str) -> None:
        """The router answers at once and loads on, whether anybody waits or not."""
        if (await self._status(model)).get("value") not in (*LOADED, LOADING):
            (await post(self._backend, "/models/load", {"model": model})).check()
        wait_s = self._backend.config.read_timeout_s
        try:
            async with asyncio.timeout(wait_s):
                await self._until_loaded(model)
        except TimeoutError:
            raise TaskFailed(f"has not loaded it within {wait_s:g} s") from None

    async def _until_loaded(self, model: str) -> None:
        while (status := await self._status(model)).get("value") not in LOADED:
            if status.get("value") != LOADING:
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

    async def _status(self, model: str) -> Mapping[str, Any]:
        return (await discovery.ask(self._backend, "/v1/models", _router_states)).get(model, {})


def _router_states(answer: object) -> dict[str, dict[str, Any]]:
    """The state of each model by its name; empty for a server without router mode. Raises ValueError for no list of models."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise ValueError("no list of models")
    entries = [entry for entry in data if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    return {entry["id"]: entry["status"] for entry in entries if isinstance(entry.get("status"), dict)}


def _busy_slots(answer: object) -> int:
    return (
        sum(isinstance(slot, dict) and slot.get("is_processing") is True for slot in answer) if isinstance(answer, list) else 0
    )


async def memory_of(backend: Backend) -> ModelMemory | None:
    """None for a backend that has its models loaded always, or loads them by itself only. Raises BackendFault."""
    if backend.kind == "ollama":
        return OllamaMemory(backend)
    return RouterMemory(backend) if await discovery.ask(backend, "/v1/models", _router_states) else None


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
