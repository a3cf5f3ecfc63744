"""Finds a backend that answers a call: claims one, sends, reads the first frame; where that fails, goes on to the next."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.core.cancel_scope import CallScope
from gateway.core.errors import (
    AnswerTooLarge,
    BackendCannot,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BadRequest,
    GatewayError,
    NoBackend,
)
from gateway.core.shared_bytes import Lease
from gateway.dialects.answers import LONGEST_FRAME, BadFrame, LongFrame, judge_whole, read_answer, try_read
from gateway.dialects.dialect import Call, Dialect
from gateway.fleet import refusals
from gateway.fleet.attempt import CANNOT, Attempt
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.frame_buffer import FrameBuffer
from gateway.fleet.backends.http_client import BackendFault, BackendResponse, TooLarge
from gateway.fleet.catalog import Model
from gateway.fleet.held_answers import HeldAnswers
from gateway.fleet.scheduler import Candidate, choose, is_served

RETRY_AFTER_S = 5.0
LONGEST_RETRY_AFTER_S = 60.0
LONGEST_ERROR_BODY, ERROR_BODY_WAITS_S = 65_536, 2.0
# Pings before the first frame are passed on with it, but nobody needs megabytes of them.
LONGEST_COMMENTS = 4096
# A ping a second for ten minutes is a fraction of it.
MOST_BEFORE_FIRST_FRAME = 262_144
TIMEOUTS = frozenset({"head_timeout", "first_byte_timeout"})
UNAVAILABLE = frozenset({"unreachable", "connect_timeout", "busy", "full", "disconnected"})
NOT_ASKED = frozenset({"unreachable", "connect_timeout", "full"})
# Faults that a wrong request may cause, too, where the backend's words for it are unknown.
DOUBTFUL = frozenset({"bad_status", "bad_first_frame"})


@dataclass(slots=True)
class Opening:
    """The beginning of a good answer: for a stream its first complete frames and what was read of the next, else all of it
    and what it means.

    `close` is owed to it, or `give_back` and `held.close`.
    """

    backend: Backend
    upstream: BackendResponse
    frames: bytes = field(repr=False)
    held: FrameBuffer | Lease = field(repr=False)
    at_end: bool = False
    value: Any = field(default=None, repr=False)

    def give_back(self) -> None:
        """The backend's connection, and no more: what was read is still held."""
        self.upstream.close()
        self.backend.give_back()

    def close(self) -> None:
        self.held.close()
        self.give_back()


class Busy(BackendFault):
    """The backend has no room; it may say when it will."""

    def __init__(self, status: int, retry_after: float | None) -> None:
        super().__init__("busy", f"status {status}")
        self.retry_after = retry_after


class Failover:
    def __init__(self, backends: Mapping[str, Backend], held: HeldAnswers, *, most_tokens: int) -> None:
        self._backends, self.held, self.most_tokens = backends, held, most_tokens

    def route(self, call: Call, dialect: Dialect, model: Model, headers: bytes, caller: str) -> "Routing":
        """Decides which backends are tried; `Routing.open` then asks them. `headers` are whole lines."""
        candidates = choose(model, self._backends, call, time.time())
        if not candidates and not is_served(model, call):
            raise BadRequest("this model is served by the OpenAI-compatible routes alone: use /v1/chat/completions")
        return Routing(self, candidates, call, dialect, headers, caller)


class Routing:
    """One call on its way to a backend. What was done for it can be read at any time, also after `open` was cancelled."""

    def __init__(
        self, failover: Failover, candidates: list[Candidate], call: Call, dialect: Dialect, headers: bytes, caller: str
    ) -> None:
        self._failover, self._candidates = failover, candidates
        self._call, self._dialect, self._headers, self._caller = call, dialect, headers, caller
        # The backends that did not answer; the fault of the last of them; the time that all of them took.
        self.attempts: list[Attempt] = []
        self.detail = ""
        self.upstream_s = 0.0
        # Whether a backend may be at work on it, or was to the end.
        self.was_sent = False
        # The backend that answered or refused, and the name under which it has the model.
        self.backend = self.answered_as = ""
        self._faults: list[BackendFault] = []
        self._refused: BackendCannot | None = None
        self._doubtful: list[Backend] = []

    async def open(self, guard: CallScope) -> Opening:
        """The beginning of the first good answer; raises BackendRefused, NoBackend, BackendTimeout or BackendFailed."""
        for candidate in self._candidates:
            backend, spelling = candidate
            began = time.monotonic()
            self.was_sent = True
            try:
                opening = await self._try(candidate, guard)
            except BackendFault as fault:
                self._add_fault(backend, fault, time.monotonic() - began)
                if self._has_enough:
                    break
            except BackendCannot as refused:
                self._add_inability(backend, refused, time.monotonic() - began)
            except BackendRefused:
                self.backend = backend.name
                self._doubt()
                raise
            else:
                self.backend, self.answered_as = backend.name, spelling
                # The request was right, so those that may have failed because of it have failed.
                for doubtful in self._doubtful:
                    doubtful.breaker.failed()
                return opening
            finally:
                self.upstream_s += time.monotonic() - began
        self._doubt()
        raise self._refused or failure_of(self._faults)

    @property
    def _has_enough(self) -> bool:
        """Of those that cannot do what is asked, one other is asked: it may be of another build."""
        others = [fault for fault in self._faults if fault.reason not in NOT_ASKED]
        return self._refused is not None and bool(others)

    def _add_fault(self, backend: Backend, fault: BackendFault, took_s: float) -> None:
        self._faults.append(fault)
        self.was_sent = False
        self.attempts.append(Attempt(backend.name, fault.reason, took_s * 1000, fault.detail))
        self.detail = str(fault)
        if fault.reason in DOUBTFUL:
            self._doubtful.append(backend)

    def _add_inability(self, backend: Backend, refused: BackendCannot, took_s: float) -> None:
        """Raises the second."""
        if self._refused is not None:
            self.backend = backend.name
            self._doubt()
            raise refused
        self._refused = refused
        self._faults.clear()
        self.was_sent = False
        self.attempts.append(Attempt(backend.name, CANNOT, took_s * 1000))

    def _doubt(self) -> None:
        """No backend answered: those that may have failed because of the request count it once for each caller."""
        for backend in self._doubtful:
            backend.breaker.doubted(self._caller)

    async def _try(self, candidate: Candidate, guard: CallScope) -> Opening:
        backend, spelling = candidate
        if backend.is_full:
            raise BackendFault("full", f"{backend.in_flight} requests in flight")
        body = self._call.body_for(backend.kind, spelling, self._failover.most_tokens)
        backend.take()
        began = time.monotonic()
        upstream = None
        try:
            upstream = await backend.post(self._call.operation.path.encode(), self._headers, body, guard)
            guard.within(backend.config.read_timeout_s, _no_first_byte, upstream.fail)
            opening = await self._read_beginning(backend, upstream)
            backend.breaker.succeeded()
        except BaseException as wrong:
            if isinstance(wrong, BackendFault) and not _is_inconclusive(wrong, backend, began):
                backend.breaker.failed()
            if upstream is not None:
                upstream.close()
            backend.give_back()
            raise
        finally:
            guard.without_deadline()
        return opening

    async def _read_beginning(self, backend: Backend, upstream: BackendResponse) -> Opening:
        """Reads until the first frame, or the whole answer, has proved to be good."""
        try:
            if upstream.status != 200:
                raise await refusal(upstream, backend)
            if self._call.stream:
                return await _first_frames(backend, upstream, self._dialect)
            return await _whole(backend, upstream, self._call, Lease(self._failover.held, self._caller))
        except (LongFrame, TooLarge) as large:
            # As many tokens were asked for; the next backend would make them all again.
            raise AnswerTooLarge from large
        except BadFrame as bad:
            reported = refusals.read(bad.error)
            refused = refusals.meaning(200, reported, backend.config) if bad.error else None
            raise refused or _failed("bad_first_frame", refusals.scrub(str(bad), backend.config), reported) from bad
        except BackendFault as fault:
            raise BackendFault("cut_short", fault.detail) if fault.reason == "broken_off" else fault from None


def _no_first_byte() -> BackendFault:
    return BackendFault("first_byte_timeout")


def _is_inconclusive(fault: BackendFault, backend: Backend, began: float) -> bool:
    """Whether a backend may work in spite of this: one that has answered others meanwhile was only asked for much.

    A doubtful fault is decided on when other backends have answered the same request, or failed as well.
    """
    if fault.reason in TIMEOUTS:
        return backend.breaker.has_succeeded_since(began)
    return fault.reason in ("model_gone", "full", *DOUBTFUL) or (isinstance(fault, Busy) and fault.detail == "status 429")


async def _whole(backend: Backend, upstream: BackendResponse, call: Call, held: Lease) -> Opening:
    try:
        whole = await upstream.read_whole(hold=held.hold)
        value = read_answer(whole)
        judge_whole(value, call.operation)
    except BaseException:
        held.close()
        raise
    return Opening(backend, upstream, whole, held, at_end=True, value=value)


async def _first_frames(backend: Backend, upstream: BackendResponse, dialect: Dialect) -> Opening:
    buffer = FrameBuffer(dialect.framing, backend.unframed)
    try:
        frames, at_end = await _until_first(buffer, upstream, dialect)
    except BaseException:
        buffer.close()
        raise
    return Opening(backend, upstream, frames, buffer, at_end=at_end)


async def _until_first(buffer: FrameBuffer, upstream: BackendResponse, dialect: Dialect) -> tuple[bytes, bool]:
    """The first frames with the comments before them, and whether that is all."""
    comments, framing, silence = b"", dialect.framing, 0
    while piece := await upstream.read():
        frames = buffer.add(piece)
        if payloads := framing.payloads(frames):
            dialect.judge_frame(payloads[0])
            return comments + frames, False
        silence += len(frames)
        if silence > MOST_BEFORE_FIRST_FRAME:
            raise BadFrame(f"no frame in the first {silence} bytes")
        if len(comments) + len(frames) <= LONGEST_COMMENTS:
            comments += frames
        if len(buffer.rest) > LONGEST_FRAME:
            raise LongFrame("no end of the first frame")
    data = buffer.take()
    payloads = framing.payloads(data)
    if not payloads:
        raise BadFrame("not a stream of frames" if data.strip() else "an empty answer", _error_in(data))
    dialect.judge_frame(payloads[0])
    return comments + data, True


def _error_in(data: bytes) -> dict[str, Any]:
    reported = try_read(data)
    return reported if reported.get("error") else {}


async def refusal(upstream: BackendResponse, backend: Backend) -> BackendFault | GatewayError:
    """What a status other than 200 means."""
    status = upstream.status
    if status in (429, 503):
        return Busy(status, retry_after(upstream.headers.get("Retry-After", "")))
    if status == 404:
        return BackendFault("model_gone", "status 404")
    if status in (401, 403):
        return BackendFault("token_refused", f"status {status}")
    if status < 400:
        return BackendFault("bad_status", f"status {status}")
    reported = refusals.read(try_read(await _error_body(upstream)))
    return refusals.meaning(status, reported, backend.config) or _failed("bad_status", f"status {status}", reported)


def _failed(reason: str, detail: str, reported: refusals.Told) -> BackendFault:
    why = refusals.why(reported)
    return BackendFault(reason, f"{detail}: {why}" if why else detail)


async def _error_body(upstream: BackendResponse) -> bytes:
    """What comes of it soon: a failure is known without its words."""
    try:
        async with asyncio.timeout(ERROR_BODY_WAITS_S):
            return await upstream.read_beginning(LONGEST_ERROR_BODY)
    except (TimeoutError, BackendFault):
        return b""


def retry_after(text: str) -> float | None:
    return min(float(text), LONGEST_RETRY_AFTER_S) if re.fullmatch(r"\d{1,6}", text.strip()) else None


def failure_of(faults: Sequence[BackendFault]) -> GatewayError:
    """What to tell a caller when every backend failed, and when to come back."""
    waits = [fault.retry_after for fault in faults if isinstance(fault, Busy) and fault.retry_after]
    reasons = {fault.reason for fault in faults}
    if reasons <= UNAVAILABLE:
        return NoBackend(retry_after=min(waits, default=RETRY_AFTER_S))
    if reasons & TIMEOUTS:
        return BackendTimeout()
    if reasons == {"model_gone"}:
        return NoBackend(retry_after=RETRY_AFTER_S)
    return BackendFailed()
