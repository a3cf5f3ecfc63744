"""Which backend answers a call: choose, claim, send, look at the first frame, and go on to the next up to that wall."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gateway.audit.record import CANNOT, Attempt, Record
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
from gateway.dialects.dialect import LONGEST_FRAME, BadFrame, Call, Dialect, LongFrame, judge_whole, read_answer, try_read
from gateway.fleet import refusals
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.frame_buffer import FrameBuffer
from gateway.fleet.backends.http_client import BackendFault, BackendResponse, TooLarge
from gateway.fleet.catalog import Model
from gateway.fleet.held_answers import HeldAnswer, HeldAnswers

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
# What a backend says of a request that is wrong, too, in words that we do not know.
TOLD = frozenset({"bad_status", "bad_first_frame"})


class Candidate(NamedTuple):
    backend: Backend
    spelling: str


@dataclass(slots=True)
class Opening:
    """The beginning of a good answer: for a stream its first complete frames and what was read of the next, else all of it
    and what it means.

    `close` is owed to it, or `give_back` and `held.close`.
    """

    backend: Backend
    upstream: BackendResponse
    frames: bytes = field(repr=False)
    held: FrameBuffer | HeldAnswer = field(repr=False)
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


def choose(model: Model, backends: Mapping[str, Backend], call: Call, now: float) -> list[Candidate]:
    """The backends to try, in order: those whose breaker lets pass, then the others as the last resort."""
    able = [
        Candidate(backend, offer.spelling)
        for offer in model.offers
        if offer.good_until > now
        and (backend := backends.get(offer.backend)) is not None
        and not backend.is_drained
        and offer.kind in call.operation.kinds
    ]
    return [c for c in able if c.backend.breaker.lets_pass] + [c for c in able if not c.backend.breaker.lets_pass]


def is_served(model: Model, call: Call) -> bool:
    """Whether any backend with this model, up or not, has the route that was called."""
    return any(offer.kind in call.operation.kinds for offer in model.offers)


class Tried:
    """What the backends asked so far have said of one call."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._faults: list[BackendFault] = []
        self._cannot: BackendCannot | None = None
        self._doubtful: list[Backend] = []

    @property
    def is_enough(self) -> bool:
        """Of those that cannot do what is asked, one other is asked: it may be of another build."""
        others = [fault for fault in self._faults if fault.reason not in NOT_ASKED]
        return self._cannot is not None and bool(others)

    def failed(self, backend: Backend, fault: BackendFault, took_s: float) -> None:
        self._faults.append(fault)
        self._record.was_sent = False
        self._record.attempts.append(Attempt(backend.name, fault.reason, took_s * 1000, fault.detail))
        self._record.detail = str(fault)
        if fault.reason in TOLD:
            self._doubtful.append(backend)

    def cannot(self, backend: Backend, refused: BackendCannot, took_s: float) -> None:
        """Raises it where that makes two."""
        if self._cannot is not None:
            self._record.backend = backend.name
            self.answered_by_none()
            raise refused
        self._cannot = refused
        self._faults.clear()
        self._record.was_sent = False
        self._record.attempts.append(Attempt(backend.name, CANNOT, took_s * 1000))

    def answered_well(self) -> None:
        """Then the request was right, and those before have failed."""
        for backend in self._doubtful:
            backend.breaker.failed()

    def answered_by_none(self) -> None:
        for backend in self._doubtful:
            backend.breaker.doubted(self._record.key_id)

    def failure(self) -> GatewayError:
        self.answered_by_none()
        return self._cannot or failure_of(self._faults)


class Failover:
    def __init__(self, backends: Mapping[str, Backend], held: HeldAnswers, *, most_tokens: int) -> None:
        self._backends, self._held, self._most_tokens = backends, held, most_tokens

    async def open(
        self, call: Call, dialect: Dialect, model: Model, headers: bytes, record: Record, guard: CallScope
    ) -> Opening:
        """The first good answer's beginning; raises BackendRefused, NoBackend, BackendTimeout or BackendFailed."""
        candidates = choose(model, self._backends, call, time.time())
        if not candidates and not is_served(model, call):
            raise BadRequest("this model is served by the OpenAI-compatible routes alone: use /v1/chat/completions")
        tried = Tried(record)
        for candidate in candidates:
            backend, spelling = candidate
            began = time.monotonic()
            record.was_sent = True
            try:
                opening = await self._try(candidate, call, dialect, headers, record.key_id, guard)
            except BackendFault as fault:
                tried.failed(backend, fault, time.monotonic() - began)
                if tried.is_enough:
                    break
                continue
            except BackendCannot as refused:
                tried.cannot(backend, refused, time.monotonic() - began)
                continue
            except BackendRefused:
                record.backend = backend.name
                tried.answered_by_none()
                raise
            finally:
                record.upstream_s += time.monotonic() - began
            record.backend, record.answered_as = backend.name, spelling
            if record.attempts:
                tried.answered_well()
            return opening
        raise tried.failure()

    async def _try(
        self, candidate: Candidate, call: Call, dialect: Dialect, headers: bytes, caller: str, guard: CallScope
    ) -> Opening:
        backend, spelling = candidate
        if backend.is_full:
            raise BackendFault("full", f"{backend.in_flight} requests in flight")
        body = call.body_for(backend.kind, spelling, self._most_tokens)
        backend.take()
        began = time.monotonic()
        upstream = None
        try:
            upstream = await backend.post(call.operation.path.encode(), headers, body, guard)
            guard.within(backend.config.read_timeout_s, _no_first_byte, upstream.fail)
            opening = await self._look(backend, upstream, call, dialect, caller)
            backend.breaker.succeeded()
        except BaseException as wrong:
            if isinstance(wrong, BackendFault) and not _says_nothing_of_it(wrong, backend, began):
                backend.breaker.failed()
            if upstream is not None:
                upstream.close()
            backend.give_back()
            raise
        finally:
            guard.without_deadline()
        return opening

    async def _look(self, backend: Backend, upstream: BackendResponse, call: Call, dialect: Dialect, caller: str) -> Opening:
        """Reads on until the first frame, or the whole answer, has shown itself to be good."""
        try:
            if upstream.status != 200:
                raise await refusal(upstream, backend)
            if call.stream:
                return await _first_frames(backend, upstream, dialect)
            return await _whole(backend, upstream, call, HeldAnswer(self._held, caller))
        except (LongFrame, TooLarge) as large:
            # As many tokens were asked for; the next backend would make them all again.
            raise AnswerTooLarge from large
        except BadFrame as bad:
            told = refusals.read(bad.error)
            refused = refusals.meaning(200, told, backend.config) if bad.error else None
            raise refused or _failed("bad_first_frame", refusals.scrub(str(bad), backend.config), told) from bad
        except BackendFault as fault:
            raise BackendFault("cut_short", fault.detail) if fault.reason == "broken_off" else fault from None


def _no_first_byte() -> BackendFault:
    return BackendFault("first_byte_timeout")


def _says_nothing_of_it(fault: BackendFault, backend: Backend, began: float) -> bool:
    """Whether a backend may be well in spite of this: one that has answered others meanwhile was only asked for much.

    What another says to the same request decides on what it told itself.
    """
    if fault.reason in TIMEOUTS:
        return backend.breaker.has_succeeded_since(began)
    return fault.reason in ("model_gone", "full", *TOLD) or (isinstance(fault, Busy) and fault.detail == "status 429")


async def _whole(backend: Backend, upstream: BackendResponse, call: Call, held: HeldAnswer) -> Opening:
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
    told = try_read(data)
    return told if told.get("error") else {}


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
    told = refusals.read(try_read(await _error_body(upstream)))
    return refusals.meaning(status, told, backend.config) or _failed("bad_status", f"status {status}", told)


def _failed(reason: str, detail: str, told: refusals.Told) -> BackendFault:
    why = refusals.why(told)
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
