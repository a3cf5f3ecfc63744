"""What a fake backend can do on a connection: single steps, scripts built of them, and named faults."""

import json
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Pairs = Sequence[tuple[str, str]]
Outcome = Literal["answered", "client_left", "aborted"]

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
JSON = "application/json; charset=utf-8"
PLAIN = "text/plain"
HTML = "text/html"

RECORDINGS = Path(__file__).parent / "recordings"


@dataclass
class Received:
    """A received request. `outcome` and `finished` are None while it is being answered.

    `last_step` is the time just before the last byte was sent: no client can have had the whole answer earlier.
    """

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int
    started: float
    finished: float | None = None
    outcome: Outcome | None = None
    last_step: float = 0.0

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name.lower()), None)


@dataclass(frozen=True)
class Head:
    """Status line and headers; without `chunked` and `content_length` the body ends with the connection."""

    status: int = 200
    headers: Pairs = ()
    chunked: bool = False
    content_length: int | None = None


@dataclass(frozen=True)
class Piece:
    """Bytes of the body; one chunk if the head is chunked."""

    data: bytes


@dataclass(frozen=True)
class Raw:
    """Bytes without any framing."""

    data: bytes


@dataclass(frozen=True)
class Pause:
    """Silence for a time."""

    seconds: float


@dataclass(frozen=True)
class Hold:
    """Silence until the test sets the event."""

    event: threading.Event = field(compare=False)


@dataclass(frozen=True)
class Forever:
    """Silence until the client leaves."""


@dataclass(frozen=True)
class End:
    """The chunk that ends a chunked body."""


@dataclass(frozen=True)
class Reset:
    """RST, once everything sent has reached the client's kernel."""


@dataclass(frozen=True)
class Close:
    """FIN."""


Step = Head | Piece | Raw | Pause | Hold | Forever | End | Reset | Close
Steps = Sequence[Step]
Script = Steps | Callable[[Received], Steps]
How = Literal["reset", "close"]


def recording(name: str) -> bytes:
    return (RECORDINGS / name).read_bytes()


def compact(value: object) -> bytes:
    """JSON as the servers write it: no spaces, UTF-8, U+2028 and U+2029 escaped as in Go."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()


def answer(status: int, body: bytes | object = b"", content_type: str = JSON, *headers: tuple[str, str]) -> list[Step]:
    """A whole answer with its length; a body that is not bytes is written as JSON."""
    data = body if isinstance(body, bytes) else compact(body)
    typed = [("Content-Type", content_type)] if content_type else []
    return [Head(status, [*typed, *headers], content_length=len(data)), Piece(data)]


def stream(frames: Iterable[bytes], content_type: str = SSE, pause_s: float = 0.0) -> list[Step]:
    """A chunked answer, one chunk per frame."""
    steps: list[Step] = [Head(200, [("Content-Type", content_type)], chunked=True)]
    for number, frame in enumerate(frames):
        if number and pause_s:
            steps.append(Pause(pause_s))
        steps.append(Piece(frame))
    return [*steps, End()]


def frames_of(data: bytes) -> list[bytes]:
    """Splits a recording after each record (NDJSON) or event (SSE)."""
    mark = next((mark for mark in (b"\r\n\r\n", b"\n\n") if mark in data), b"\n")
    pieces = data.split(mark)
    return [piece + mark for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])


def ndjson(records: Iterable[object]) -> list[bytes]:
    return [compact(record) + b"\n" for record in records]


def sse(events: Iterable[object], done: bool = True) -> list[bytes]:
    frames = [b"data: " + compact(event) + b"\n\n" for event in events]
    return [*frames, b"data: [DONE]\n\n"] if done else frames


def cut_at(
    body: bytes,
    n: int,
    how: How = "reset",
    content_type: str = SSE,
    framing: Literal["chunked", "mid_chunk", "length"] = "chunked",
) -> list[Step]:
    """An answer cut after the first n bytes of its body: between chunks, inside a chunk, or short of its length."""
    typed = [("Content-Type", content_type)]
    last: Step = Reset() if how == "reset" else Close()
    if framing == "length":
        return [Head(200, typed, content_length=len(body)), Piece(body[:n]), last]
    if framing == "chunked":
        return [Head(200, typed, chunked=True), Piece(body[:n]), last]
    return [Head(200, typed, chunked=True), Raw(b"%x\r\n" % len(body) + body[:n]), last]


Dialect = Literal["ollama", "openai"]
Fault = Callable[[Dialect, bool], list[Step]]

_GATEWAY_PAGE = (
    b"<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>\r\n"
    b"<center><h1>502 Bad Gateway</h1></center>\r\n<hr><center>nginx/1.27.3</center>\r\n</body>\r\n</html>\r\n"
)
_LOGIN_PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><form>Please sign in</form></body></html>\n"

_WORDS: dict[int, tuple[str, str, str]] = {
    429: ("too many requests, please slow down", "Too many requests", "RateLimitError"),
    500: (
        "model runner has unexpectedly stopped, this may be due to resource limitations or an internal error",
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "InternalServerError",
    ),
    503: ("server busy, please try again.  maximum pending requests exceeded", "Loading model", "unavailable_error"),
}


def error_body(dialect: Dialect, status: int) -> dict[str, Any]:
    """An error in the words of Ollama or of an OpenAI-compatible server."""
    native, message, kind = _WORDS[status]
    if dialect == "ollama":
        return {"error": native}
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def content_type_of(dialect: Dialect, streamed: bool) -> str:
    if not streamed:
        return JSON
    return NDJSON if dialect == "ollama" else SSE


def _error_head(status: int) -> Fault:
    return lambda dialect, streamed: answer(status, error_body(dialect, status))


def _empty_body(dialect: Dialect, streamed: bool) -> list[Step]:
    content_type = content_type_of(dialect, streamed)
    return stream([], content_type) if streamed else answer(200, b"", content_type)


def _error_first_frame(dialect: Dialect, streamed: bool) -> list[Step]:
    error = error_body(dialect, 500)
    if not streamed:
        return answer(200, error)
    return stream(ndjson([error]) if dialect == "ollama" else sse([error]), content_type_of(dialect, streamed))


def _after_head(last: Step) -> Fault:
    return lambda dialect, streamed: [
        Head(200, [("Content-Type", content_type_of(dialect, streamed))], streamed, None if streamed else 300),
        last,
    ]


FAULTS: dict[str, Fault] = {
    "head_timeout": lambda dialect, streamed: [Forever()],
    "429": _error_head(429),
    "500": _error_head(500),
    "502": lambda dialect, streamed: answer(502, _GATEWAY_PAGE, HTML),
    "503": _error_head(503),
    "empty_body": _empty_body,
    "error_first_frame": _error_first_frame,
    "garbage": lambda dialect, streamed: answer(200, _LOGIN_PAGE, HTML),
    "reset": lambda dialect, streamed: [Reset()],
    "reset_after_head": _after_head(Reset()),
    "close_after_head": _after_head(Close()),
}
