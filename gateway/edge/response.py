"""The response to one request: its headers, its size and outcome, and the headers of an error."""

import re
from collections.abc import Sequence

from starlette.types import Message, Send

from gateway.audit.record import Record
from gateway.audit.settlement import Settler
from gateway.core.errors import GatewayError, MethodNotAllowed
from gateway.dialects.anthropic import Anthropic
from gateway.edge import anthropic_headers

EXPOSED = (
    b", retry-after, retry-after-ms, x-should-retry, x-gateway-backend, x-gateway-chosen, x-gateway-overhead-ms, "
    b"x-gateway-max-tokens, x-queue-position, x-queue-wait-ms, "
    b"x-ratelimit-limit-requests, x-ratelimit-limit-tokens, x-ratelimit-remaining-requests, x-ratelimit-remaining-tokens, "
    b"x-ratelimit-reset-requests, x-ratelimit-reset-tokens, x-gateway-translated-to, x-gateway-dropped, x-gateway-estimated, "
    b"request-id, anthropic-ratelimit-requests-limit, anthropic-ratelimit-requests-remaining, "
    b"anthropic-ratelimit-requests-reset, anthropic-ratelimit-tokens-limit, anthropic-ratelimit-tokens-remaining, "
    b"anthropic-ratelimit-tokens-reset"
)
ANTHROPIC = Anthropic.name
UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
MOST_NAMES, LONGEST_NAMES = 20, 500
# Browsers must not treat the output of a model or a backend as a page, whatever its content is.
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
PREFLIGHT_HEADERS = (
    b"authorization, content-type, content-encoding, user-agent, accept, x-requested-with, x-api-key, api-key, "
    b"x-request-id, openai-beta, openai-organization, openai-project, anthropic-version, anthropic-beta, "
    b"anthropic-dangerous-direct-browser-access, x-gateway-backend, x-gateway-class, x-stainless-arch, x-stainless-async, "
    b"x-stainless-custom-poll-interval, x-stainless-helper, x-stainless-helper-method, x-stainless-lang, x-stainless-os, "
    b"x-stainless-package-version, x-stainless-poll-helper, x-stainless-read-timeout, x-stainless-retry-count, "
    b"x-stainless-runtime, x-stainless-runtime-version, x-stainless-stream-helper, x-stainless-timeout"
)


class Response:
    """`send` of one request: adds our headers, counts bytes, and holds the head until the first piece of the body."""

    def __init__(self, record: Record, send: Send, settler: Settler, id_header: bytes, *, with_cors: bool) -> None:
        self._record, self._send, self._settler, self._id_header = record, send, settler, id_header
        self.with_cors = with_cors
        self._head: Message | None = None
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._record.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._own_headers()]
            if self._record.dialect == ANTHROPIC:
                message["headers"] += anthropic_headers.of(message["headers"], self._record.request_id)
            self._head = message
            return
        self._record.bytes_out += len(message.get("body", b""))
        if not message.get("more_body", False):
            self._record.outcome = self._record.outcome or plain_outcome(self._record)
            await self._settler.finish_before_last_bytes(self._record)
        if self._head is not None:
            head, self._head = self._head, None
            await self._send(head)
        await self._send(message)

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        headers = [(self._id_header, self._record.request_id.encode()), NO_SNIFFING]
        if self._record.show_backend and self._record.backend:
            headers.append((b"x-gateway-backend", self._record.backend.encode()))
            if self._record.chosen_because:
                headers.append((b"x-gateway-chosen", self._record.chosen_because.encode()))
            if self._record.translated_to:
                headers.append((b"x-gateway-translated-to", self._record.translated_to.encode()))
            if self._record.dropped:
                headers.append((b"x-gateway-dropped", _names(self._record.dropped)))
        if self._record.show_overhead:
            headers.append((b"x-gateway-overhead-ms", b"%.2f" % (self._record.overhead_s * 1000)))
        if self._record.chosen_because or self._record.queue_position:
            headers.append((b"x-queue-position", b"%d" % self._record.queue_position))
        if self._record.chosen_because:
            headers.append((b"x-queue-wait-ms", b"%d" % self._record.queue_ms))
        if self._record.admission is not None:
            headers += self._record.admission.headers
        if self.with_cors:
            # Keys are in headers or the path, never in cookies, so any origin may send requests.
            exposed = self._id_header + EXPOSED
            headers += [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", exposed)]
        return headers

    async def preflight(self) -> None:
        headers = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, PATCH, DELETE, OPTIONS"),
            (b"access-control-allow-headers", PREFLIGHT_HEADERS),
            (b"access-control-max-age", b"86400"),
        ]
        await self.send({"type": "http.response.start", "status": 204, "headers": headers})
        await self.send({"type": "http.response.body", "body": b""})


def _names(dropped: Sequence[str]) -> bytes:
    """Names of fields and types, which clients choose, as the value of a header."""
    text = ", ".join(dropped[:MOST_NAMES])
    return UNPRINTABLE.sub("?", text)[:LONGEST_NAMES].encode()


def plain_outcome(record: Record) -> str:
    return "answered" if record.status < 400 else "refused"


def error_headers(error: GatewayError, body: bytes, *, close: bool = False) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.retry_after is not None:
        headers.append((b"retry-after", str(max(1, -int(-error.retry_after // 1))).encode()))
        headers.append((b"retry-after-ms", str(max(1, round(error.retry_after * 1000))).encode()))
    headers += error.headers
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    if close:
        headers.append((b"connection", b"close"))
    return headers
