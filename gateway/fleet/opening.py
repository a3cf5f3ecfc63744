"""Reads the beginning of a backend's answer until it has proved to be good, or what is wrong with it."""

import asyncio
import re
from dataclasses import dataclass, field
from typing import Any

from gateway.core.errors import AnswerTooLarge, GatewayError
from gateway.core.shared_bytes import Reservation
from gateway.dialects.answers import JSON, LONGEST_FRAME, BadFrame, LongFrame, judge_whole, media_type, read_answer, try_read
from gateway.dialects.dialect import Call, Dialect, Operation
from gateway.dialects.translation.translation import Translation
from gateway.fleet import redaction, refusals
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.frame_buffer import FrameBuffer
from gateway.fleet.backends.http_client import BackendFault, BackendResponse, TooLarge
from gateway.fleet.slot import Slot
from gateway.fleet.translated_response import TranslatedResponse

LONGEST_RETRY_AFTER_S = 60.0
LONGEST_ERROR_BODY, ERROR_BODY_WAITS_S = 65_536, 2.0
# Pings before the first frame are passed on with it, but no client needs megabytes of them.
LONGEST_COMMENTS = 4096
# A ping a second for ten minutes is a fraction of it.
MOST_BEFORE_FIRST_FRAME = 262_144
# The fault of a backend without the route that was called.
NO_ROUTE = "no_route"
# LM Studio answers with status 200 and this text.
UNKNOWN_ENDPOINT = re.compile(r"unexpected endpoint or method", re.IGNORECASE)
# The transcription of silence.
EMPTY_IF_SILENT = "text/"
OF_A_MODEL = re.compile(r"\bmodels?\b", re.IGNORECASE)

Upstream = BackendResponse | TranslatedResponse


@dataclass(slots=True)
class Opening:
    """The beginning of a good answer: of a stream its first frames and what was read of the next; of JSON all, parsed.

    Of other media it has the first bytes, and no `value`.

    The owner must `close` it, or `give_back` and `held.close`.
    """

    backend: Backend
    upstream: Upstream
    frames: bytes = field(repr=False)
    held: FrameBuffer | Reservation = field(repr=False)
    at_end: bool = False
    value: Any = field(default=None, repr=False)
    translation: Translation | None = None
    slot: Slot | None = None

    def give_back(self) -> None:
        """Returns the backend's connection and its slot; what was read is still held."""
        self.upstream.close()
        self.backend.give_back()
        if self.at_end:
            self.free_slot()
        elif self.slot is not None:
            self.slot.free_soon()

    def free_slot(self) -> None:
        """The backend has done its work; the last bytes may still be on their way to the client."""
        if self.slot is not None:
            self.slot.free()

    def close(self) -> None:
        self.held.close()
        self.give_back()


class Busy(BackendFault):
    """The backend accepts no more requests; it may state when it will."""

    def __init__(self, status: int, retry_after: float | None) -> None:
        super().__init__("busy", f"status {status}")
        self.retry_after = retry_after


async def read_beginning(
    backend: Backend, upstream: Upstream, call: Call, dialect: Dialect, reservation: Reservation
) -> Opening:
    """Reads until the first frame, or the whole answer, has proved to be good; `reservation` is for a whole one.

    Raises BackendFault where the backend failed, BackendRefused where it will not, AnswerTooLarge and AnswersUnread.
    """
    try:
        if upstream.status != 200:
            raise await refusal(upstream, backend, _asked(upstream, call))
        if call.operation.media:
            return await _of_any_type(backend, upstream, call, dialect, reservation)
        if call.stream:
            return await _first_frames(backend, upstream, dialect)
        return await _whole(backend, upstream, call, reservation)
    except (LongFrame, TooLarge) as large:
        # The client asked for this much; another backend would produce the same.
        raise AnswerTooLarge from large
    except BadFrame as bad:
        reported = refusals.read(bad.error)
        if _asked(upstream, call).is_optional and UNKNOWN_ENDPOINT.search(reported.text):
            raise BackendFault(NO_ROUTE, "status 200") from bad
        refused = refusals.meaning(200, reported, backend.config) if bad.error else None
        raise refused or _failed("bad_first_frame", redaction.redact(str(bad), backend.config), reported) from bad
    except BackendFault as fault:
        raise BackendFault("cut_short", fault.detail) if fault.reason == "broken_off" else fault from None


def _asked(upstream: Upstream, call: Call) -> Operation:
    """What the backend was asked for the call."""
    return upstream.operation if isinstance(upstream, TranslatedResponse) else call.operation


async def _whole(backend: Backend, upstream: Upstream, call: Call, held: Reservation) -> Opening:
    try:
        whole = await upstream.read_whole(hold=held.hold)
        value = read_answer(whole)
        judge_whole(value, call.operation)
    except BaseException:
        held.close()
        raise
    return Opening(backend, upstream, whole, held, at_end=True, value=value)


async def _of_any_type(backend: Backend, upstream: Upstream, call: Call, dialect: Dialect, held: Reservation) -> Opening:
    """As the backend names the type: it may answer with JSON or bytes where the call asks for a stream."""
    kind, media = media_type(upstream.content_type), call.operation.media
    call.stream = kind == dialect.framing.content_type
    if call.stream:
        return await _first_frames(backend, upstream, dialect)
    if kind in JSON:
        opening = await _whole(backend, upstream, call, held)
        if not kind.startswith(media):
            held.close()
            raise BadFrame("JSON instead of what was asked for")
        return opening
    if not kind.startswith(media) or upstream.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BadFrame("an answer of another type")
    beginning = await upstream.read()
    if not beginning and not kind.startswith(EMPTY_IF_SILENT):
        raise BadFrame("an empty answer")
    return Opening(backend, upstream, beginning, held, at_end=not beginning)


async def _first_frames(backend: Backend, upstream: Upstream, dialect: Dialect) -> Opening:
    buffer = FrameBuffer(dialect.framing, backend.unframed)
    try:
        frames, at_end = await _until_first(buffer, upstream, dialect)
    except BaseException:
        buffer.close()
        raise
    return Opening(backend, upstream, frames, buffer, at_end=at_end)


async def _until_first(buffer: FrameBuffer, upstream: Upstream, dialect: Dialect) -> tuple[bytes, bool]:
    """The first frames with the comments before them, and whether the stream ended with them."""
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


async def refusal(upstream: Upstream, backend: Backend, operation: Operation) -> BackendFault | GatewayError:
    """The error for a status other than 200, to a request for this operation."""
    status = upstream.status
    if status in (429, 503):
        return Busy(status, retry_after(upstream.headers.get("Retry-After", "")))
    if operation.is_optional and status in (404, 405):
        return await _missing(upstream)
    if status == 404:
        return BackendFault("model_gone", "status 404")
    if status in (401, 403):
        return BackendFault("token_refused", f"status {status}")
    if status < 400:
        return BackendFault("bad_status", f"status {status}")
    reported = refusals.read(try_read(await _error_body(upstream)))
    return refusals.meaning(status, reported, backend.config) or _failed("bad_status", f"status {status}", reported)


async def _missing(upstream: Upstream) -> BackendFault:
    """What a backend lacks that may have neither the route nor the model."""
    reported = refusals.read(try_read(await _error_body(upstream)))
    return BackendFault("model_gone" if OF_A_MODEL.search(reported.text) else NO_ROUTE, f"status {upstream.status}")


def _failed(reason: str, detail: str, reported: refusals.ReportedError) -> BackendFault:
    known = refusals.logged_reason(reported)
    return BackendFault(reason, f"{detail}: {known}" if known else detail)


async def _error_body(upstream: Upstream) -> bytes:
    """As much as arrives soon: a failure is known without its text."""
    try:
        async with asyncio.timeout(ERROR_BODY_WAITS_S):
            return await upstream.read_beginning(LONGEST_ERROR_BODY)
    except (TimeoutError, BackendFault):
        return b""


def retry_after(text: str) -> float | None:
    return min(float(text), LONGEST_RETRY_AFTER_S) if re.fullmatch(r"\d{1,6}", text.strip()) else None
