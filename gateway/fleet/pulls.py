"""Pulls a model on one Ollama backend, and measures how fast it comes."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from gateway.core import strict_json
from gateway.dialects.answers import error_text, try_read
from gateway.dialects.model_entries import whole_number
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendResponse
from gateway.fleet.jobs import Progress, TaskFailed
from gateway.fleet.redaction import redact

PATH = "/api/pull"
HEADERS = {"Content-Type": "application/json", "Accept": "application/x-ndjson"}
# Bytes of one record, and how many layers a model may have.
LONGEST_RECORD, MOST_LAYERS = 65_536, 1000
SPEED_OVER_S, SPEED_SAMPLES = 10.0, 100
LONGEST_STATUS, SUCCESS = 200, "success"


class PullRefused(Exception):
    """The backend reports an error, in these words."""


async def pull(backend: Backend, model: str, progress: Progress) -> None:
    """Returns when the backend has the model. Ollama ends a pull whose connection is closed, and keeps what it has so far.

    It reports several times a second even while nothing arrives: a pull without progress for as long as the backend's answers
    may take is given up. Raises TaskFailed or BackendFault.
    """
    silence_s = backend.config.read_timeout_s
    transfer = Transfer()
    body = strict_json.write({"model": model, "stream": True})
    with backend.claim():
        async with backend.send("POST", PATH, HEADERS, body) as upstream:
            try:
                await _follow(upstream, transfer, progress, silence_s)
            except PullRefused as refused:
                raise TaskFailed(redact(str(refused), backend.config)) from None
            except TimeoutError:
                raise TaskFailed(f"made no progress for {silence_s:g} s") from None
    if not transfer.has_succeeded:
        raise TaskFailed("ended its answer before the model was there")
    progress.note("pulled", **transfer.facts)


async def _follow(upstream: BackendResponse, transfer: "Transfer", progress: Progress, silence_s: float) -> None:
    clock = asyncio.get_running_loop().time
    async with asyncio.timeout(silence_s) as deadline:
        while piece := await upstream.read():
            if transfer.feed(piece):
                deadline.reschedule(clock() + silence_s)
                progress.note(transfer.status, **transfer.facts)
    transfer.feed(b"\n")
    if upstream.status != 200:
        raise PullRefused(f"answered with status {upstream.status}")


class Transfer:
    """What a backend reports of one pull: its layers, and the speed of the last seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._line = b""
        # Of each layer: bytes in all, bytes there, and bytes that were there before.
        self._layers: dict[str, tuple[int, int, int]] = {}
        self._samples: deque[tuple[float, int]] = deque(maxlen=SPEED_SAMPLES + 2)
        self.status = ""
        self.has_succeeded = False

    def feed(self, piece: bytes) -> bool:
        """Takes bytes as they come; returns whether they report any progress. Raises PullRefused."""
        *lines, self._line = (self._line + piece).split(b"\n")
        if len(self._line) > LONGEST_RECORD:
            raise PullRefused("its answer is no list of records")
        return sum(self._take(try_read(line)) for line in lines if line.strip()) > 0

    def _take(self, record: dict[str, Any]) -> bool:
        if text := error_text({"error": record.get("error")}):
            raise PullRefused(text)
        status, digest = record.get("status"), record.get("digest")
        before = self.status, self._sizes()
        if isinstance(status, str):
            self.status, self.has_succeeded = status[:LONGEST_STATUS], status == SUCCESS
        if isinstance(digest, str) and (digest in self._layers or len(self._layers) < MOST_LAYERS):
            self._note_layer(digest, whole_number(record.get("total")), whole_number(record.get("completed")))
        return before != (self.status, self._sizes())

    def _note_layer(self, digest: str, total: int, completed: int) -> None:
        first = self._layers[digest][2] if digest in self._layers else completed
        self._layers[digest] = total, min(completed, total), min(first, completed)
        now = self._clock()
        if not self._samples or now - self._samples[-1][0] >= SPEED_OVER_S / SPEED_SAMPLES:
            self._samples.append((now, self._sizes()[2]))
        while len(self._samples) > 1 and now - self._samples[1][0] >= SPEED_OVER_S:
            self._samples.popleft()

    def _sizes(self) -> tuple[int, int, int]:
        """Bytes in all, bytes there, and bytes that this pull has brought."""
        layers = self._layers.values()
        completed = sum(layer[1] for layer in layers)
        return sum(layer[0] for layer in layers), completed, completed - sum(layer[2] for layer in layers)

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of a row; `percent` is of the layers that are known so far."""
        total, completed, brought = self._sizes()
        began, before = self._samples[0] if self._samples else (self._clock(), 0)
        seconds = self._clock() - began
        speed = (brought - before) / seconds if seconds > 0 else 0.0
        return {
            "percent": round(100 * completed / total, 1) if total else None,
            "completed_bytes": completed,
            "total_bytes": total,
            "bytes_per_s": round(speed) if speed > 0 else None,
            "eta_s": round((total - completed) / speed, 1) if speed > 0 and completed < total else None,
        }
