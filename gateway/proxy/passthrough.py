"""Routes that change a backend or act on its behalf: for keys with the flag admin_models, passed to one backend unchanged."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from gateway.audit.record import Record
from gateway.auth.key import ADMIN_MODELS, Key
from gateway.core import strict_json
from gateway.core.cancel_scope import CancelScope, ScopeTimer
from gateway.core.errors import (
    AnswerCutShort,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BadRequest,
    BodyTooSlow,
    ClientGone,
    GatewayError,
    NotPermitted,
)
from gateway.dialects.answers import content_type_of
from gateway.dialects.dialect import Dialect
from gateway.dialects.model_names import NAME_RULE, is_name
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault, BackendResponse
from gateway.proxy.access import Access
from gateway.proxy.body import Bodies, check_head_of_upload

LARGEST_BLOB = 2**44
LONGEST_UPLOAD_S = 86_400.0
PIECE_DEADLINE_S = 60.0
DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
PASSED_ON = {b"user-agent": "User-Agent", b"accept": "Accept"}
CHANGES_MODELS = frozenset({"/api/pull", "/api/create", "/api/copy", "/api/delete"})


@asynccontextmanager
async def cancelling_on_disconnect(receive: Receive, cancel_scope: CancelScope) -> AsyncIterator[None]:
    """Interrupts `cancel_scope` when the client closes its connection."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel_scope.interrupt(ClientGone())

    task = asyncio.create_task(watch(), name="client watch")
    try:
        yield
    finally:
        task.cancel()


def _passed_on(headers: Iterable[tuple[bytes, bytes]], request_id: str) -> dict[str, str]:
    passed = {PASSED_ON[name]: value.decode("latin-1") for name, value in headers if name in PASSED_ON}
    return {**passed, "Content-Type": "application/json", "X-Request-ID": request_id}


class Passthrough:
    """The ASGI endpoint of one route; the backend's path is made from `route`, never from the path that a client sent."""

    def __init__(
        self,
        method: str,
        route: str,
        dialect: Dialect,
        access: Access,
        backends: Mapping[str, Backend],
        scope_timer: ScopeTimer,
        models_changed: Callable[[Backend], Awaitable[None]],
        bodies: Bodies,
    ) -> None:
        self._method, self._route, self._dialect = method, route, dialect
        self._access, self._backends, self._scope_timer = access, backends, scope_timer
        self._models_changed, self._bodies = models_changed, bodies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        key = await self._access.key_of(scope, record)
        await self._access.admit(record)
        backend = self._backend_for(key, scope)
        # Set after the admission: a refused request was sent nowhere.
        record.backend = backend.name
        answer = PassthroughAnswer(self._dialect, record, send)
        headers = _passed_on(scope["headers"], record.request_id)
        try:
            if "{digest}" in self._route and self._method == "POST":
                check_head_of_upload(scope, LARGEST_BLOB)
                await self._upload(backend, self._path(scope), headers, answer, receive)
            else:
                body = await self._json(scope, receive, record)
                await self._pass(backend, self._path(scope), headers, body, answer, receive)
        except BackendFault as fault:
            record.detail = str(fault)
            await answer.fail(AnswerCutShort() if answer.started else BackendFailed())
        except GatewayError as error:
            await answer.fail(error)
        if self._route in CHANGES_MODELS and answer.is_good:
            # The client's next request may be for the new model.
            await self._models_changed(backend)
        await answer.end()

    def _backend_for(self, key: Key, scope: Scope) -> Backend:
        if ADMIN_MODELS not in key.flags:
            raise NotPermitted
        named = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-gateway-backend"), "")
        able = {name: backend for name, backend in self._backends.items() if backend.kind == "ollama"}
        backend = able.get(named) if named else next(iter(able.values()), None)
        if backend is None:
            wrong = "X-Gateway-Backend does not name an Ollama backend" if named else "no Ollama backend is configured"
            raise BadRequest(wrong)
        return backend

    def _path(self, scope: Scope) -> str:
        digest = scope.get("path_params", {}).get("digest", "")
        if "{digest}" in self._route and not DIGEST.fullmatch(digest):
            raise BadRequest("the digest must be sha256:<64 hexadecimal digits>")
        return self._route.replace("{digest}", digest)

    async def _json(self, scope: Scope, receive: Receive, record: Record) -> bytes | None:
        if self._method in ("GET", "HEAD") or not _has_body(scope):
            return None
        with CancelScope() as cancel_scope:
            raw = await self._bodies.read(scope, receive, record, cancel_scope)
        read = strict_json.read_object(raw, self._dialect.known_fields)
        record.model = _model_of(read)
        return strict_json.write_strictly(read)

    async def _pass(
        self,
        backend: Backend,
        path: str,
        headers: dict[str, str],
        body: bytes | None,
        answer: "PassthroughAnswer",
        receive: Receive,
    ) -> None:
        with self._scope_timer.call_scope() as cancel_scope, backend.claim():
            async with (
                cancelling_on_disconnect(receive, cancel_scope),
                backend.send(self._method, path, headers, body) as upstream,
            ):
                await answer.pass_on(upstream, backend.config.read_timeout_s)

    async def _upload(
        self, backend: Backend, path: str, headers: dict[str, str], answer: "PassthroughAnswer", receive: Receive
    ) -> None:
        """Passes the body on as it arrives; the deadline for the backend's answer starts when the backend has all of it."""
        upload = Upload(receive, answer.record)
        with self._scope_timer.call_scope() as cancel_scope, backend.claim():
            async with cancelling_on_disconnect(upload.rest, cancel_scope):
                try:
                    sending = backend.send(
                        self._method, path, headers, upload.pieces(cancel_scope, backend), wait_s=LONGEST_UPLOAD_S
                    )
                    async with sending as upstream:
                        cancel_scope.without_deadline()
                        await answer.pass_on(upstream, backend.config.read_timeout_s)
                except BackendFault:
                    if upload.fault is not None:
                        raise upload.fault from None
                    raise


class Upload:
    """A request's body, read piece by piece; once it is read, `rest` returns the messages after it, such as a disconnect."""

    def __init__(self, receive: Receive, record: Record) -> None:
        self._receive, self._record = receive, record
        self._ended = asyncio.Event()
        self.fault: Exception | None = None

    async def pieces(self, cancel_scope: CancelScope, backend: Backend) -> AsyncIterator[bytes]:
        more = True
        while more:
            cancel_scope.within(PIECE_DEADLINE_S, BodyTooSlow)
            message = await self._next()
            more = message.get("more_body", False)
            if piece := message.get("body", b""):
                self._record.bytes_in += len(piece)
                cancel_scope.within(backend.config.read_timeout_s, BackendTimeout)
                yield piece
        cancel_scope.within(backend.config.read_timeout_s, BackendTimeout)
        self._ended.set()

    async def _next(self) -> Message:
        """Keeps errors of the client, because aiohttp would report them as errors of the backend."""
        try:
            message = await self._receive()
        except BadRequest as wrong:
            self.fault = wrong
            raise
        if message["type"] == "http.disconnect":
            self.fault = ClientGone()
            raise self.fault
        return message

    async def rest(self) -> Message:
        await self._ended.wait()
        return await self._receive()


def _model_of(body: Mapping[str, Any]) -> str:
    """The model in the body, empty where the route needs none; raises BadRequest where it cannot be a name."""
    asked = body.get("model") or body.get("name") or body.get("source") or ""
    if asked and not is_name(asked):
        raise BadRequest(f"the model's name {NAME_RULE}")
    return str(asked)


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in scope["headers"]
    )


def _is_answer(upstream: BackendResponse) -> bool:
    """Whether its type is one that Ollama answers with: JSON, lines of JSON, or none."""
    kind = upstream.headers.get("Content-Type", "").lower().partition(";")[0].strip()
    return kind in ("", "application/json", "application/x-ndjson")


def _no_answer(upstream: BackendResponse) -> Exception:
    """The error for a page or plain text instead of an answer: a proxy sent it, or the backend has no such route."""
    if not 400 <= upstream.status < 500:
        return BackendFault("not_json", f"status {upstream.status}")
    return BackendRefused(status=upstream.status)


class PassthroughAnswer:
    """Passes on an answer of any status and form, each piece as it arrives."""

    def __init__(self, dialect: Dialect, record: Record, send: Send) -> None:
        self._dialect, self.record, self._send = dialect, record, send
        self.started = self.is_good = False

    async def pass_on(self, upstream: BackendResponse, silence_s: float) -> None:
        if not _is_answer(upstream):
            raise _no_answer(upstream)
        self.started, self.is_good = True, upstream.status < 400
        content_type = content_type_of(upstream.content_type or "application/json", self._dialect.framing)
        headers = [(b"content-type", content_type.encode("latin-1"))]
        await self._send({"type": "http.response.start", "status": upstream.status, "headers": headers})
        with CancelScope() as cancel_scope:
            cancel_scope.within(silence_s, BackendTimeout)
            while piece := await upstream.read():
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                cancel_scope.within(silence_s, BackendTimeout)

    async def fail(self, error: GatewayError) -> None:
        if not self.started:
            raise error
        self.record.outcome, self.record.detail = "truncated", self.record.detail or error.code
        await self._send({"type": "http.response.body", "body": self._dialect.error_frame(error), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
