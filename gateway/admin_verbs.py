"""The routes of a backend that change it or speak for it: for keys flagged so, to one backend, passed through as they come."""

import re
from collections.abc import AsyncIterator, Callable, Mapping

from starlette.types import Receive, Scope, Send

from gateway import strict_json
from gateway.access import Access
from gateway.backends import Backend, BackendFault, Upstream
from gateway.body import check_head, read_body
from gateway.dialects.base import Dialect
from gateway.errors import AnswerCutShort, BackendFailed, BackendTimeout, BadRequest, ClientGone, GatewayError, NotPermitted
from gateway.exchange import Running, upstream_headers, watching
from gateway.guard import Guard
from gateway.keys import ADMIN_MODELS, Key
from gateway.record import Record

LARGEST_BLOB = 2**44
DIGEST = re.compile(r"sha256[:-][0-9a-f]{64}")
# Method, route; the backend's path is the route's, built from this table and never from what a client wrote.
ROUTES = (
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
    ("HEAD", "/api/blobs/{digest}"),
    ("POST", "/api/blobs/{digest}"),
    ("GET", "/api/status"),
    ("POST", "/api/me"),
    ("POST", "/api/signout"),
    ("POST", "/api/experimental/web_search"),
    ("POST", "/api/experimental/web_fetch"),
    ("GET", "/api/experimental/model-recommendations"),
)
CHANGES_MODELS = frozenset({"/api/pull", "/api/create", "/api/copy", "/api/delete"})


class AdminVerb:
    """The ASGI endpoint of one line of ROUTES."""

    def __init__(
        self,
        method: str,
        route: str,
        dialect: Dialect,
        access: Access,
        backends: Mapping[str, Backend],
        running: Running,
        models_changed: Callable[[], None],
        *,
        longest_body: int,
    ) -> None:
        self._method, self._route, self._dialect = method, route, dialect
        self._access, self._backends, self._running = access, backends, running
        self._models_changed, self._longest_body = models_changed, longest_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        key = await self._access.key_of(scope, record)
        backend = self._backend_for(key, scope)
        record.backend = backend.name
        is_blob = "{digest}" in self._route
        body = self._blob(scope, receive, record) if is_blob else await self._json(scope, receive, record)
        answer = PassedThrough(self._dialect, record, send)
        try:
            await self._pass(backend, self._path(scope), body, answer, scope, receive)
        except BackendFault as fault:
            record.detail = str(fault)
            await answer.fail(AnswerCutShort() if answer.started else BackendFailed())
        except GatewayError as error:
            await answer.fail(error)
        await answer.end()
        if self._route in CHANGES_MODELS:
            self._models_changed()

    def _backend_for(self, key: Key, scope: Scope) -> Backend:
        if ADMIN_MODELS not in key.flags:
            raise NotPermitted
        named = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-gateway-backend"), "")
        able = {name: backend for name, backend in self._backends.items() if backend.kind == "ollama"}
        backend = able.get(named) if named else next(iter(able.values()), None)
        if backend is None:
            raise BadRequest("X-Gateway-Backend names no backend that takes this" if named else "no backend takes this")
        return backend

    def _path(self, scope: Scope) -> str:
        digest = scope["path_params"].get("digest", "")
        if "{digest}" in self._route and not DIGEST.fullmatch(digest):
            raise BadRequest("the digest must be sha256:<64 hexadecimal digits>")
        return self._route.replace("{digest}", digest)

    async def _json(self, scope: Scope, receive: Receive, record: Record) -> bytes | None:
        if self._method == "GET" or not _has_body(scope):
            return None
        raw = await read_body(scope, receive, self._longest_body, record)
        read = strict_json.read_object(raw, self._dialect.known_fields)
        record.model = str(read.get("model") or read.get("name") or read.get("source") or "")[:350]
        return strict_json.write_strictly(read)

    def _blob(self, scope: Scope, receive: Receive, record: Record) -> AsyncIterator[bytes] | None:
        if self._method == "HEAD":
            return None
        check_head(scope, LARGEST_BLOB)
        return _pieces(receive, record)

    async def _pass(
        self,
        backend: Backend,
        path: str,
        body: bytes | AsyncIterator[bytes] | None,
        answer: "PassedThrough",
        scope: Scope,
        receive: Receive,
    ) -> None:
        headers = upstream_headers(scope["headers"], answer.record.request_id)
        with self._running.guard() as guard, backend.claim():
            if not isinstance(body, bytes | None):
                # The body is still being read from the client: a hang-up shows there.
                async with backend.send(self._method, path, headers, body) as upstream:
                    await answer.pass_on(upstream, backend.config.read_timeout_s)
                return
            async with watching(receive, guard), backend.send(self._method, path, headers, body) as upstream:
                await answer.pass_on(upstream, backend.config.read_timeout_s)


def _has_body(scope: Scope) -> bool:
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in scope["headers"]
    )


async def _pieces(receive: Receive, record: Record) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if piece := message.get("body", b""):
            record.bytes_in += len(piece)
            yield piece
        if not message.get("more_body", False):
            return


class PassedThrough:
    """An answer of whatever status and form, each piece as it comes."""

    def __init__(self, dialect: Dialect, record: Record, send: Send) -> None:
        self._dialect, self.record, self._send = dialect, record, send
        self.started = False

    async def pass_on(self, upstream: Upstream, silence_s: float) -> None:
        self.started = True
        content_type = (upstream.content_type or "application/json").encode("latin-1")
        await self._send(
            {"type": "http.response.start", "status": upstream.status, "headers": [(b"content-type", content_type)]}
        )
        with Guard() as guard:
            guard.within(silence_s, BackendTimeout())
            while piece := await upstream.read():
                await self._send({"type": "http.response.body", "body": piece, "more_body": True})
                guard.within(silence_s, BackendTimeout())

    async def fail(self, error: GatewayError) -> None:
        if not self.started:
            raise error
        self.record.outcome, self.record.detail = "truncated", self.record.detail or error.code
        await self._send({"type": "http.response.body", "body": self._dialect.error_frame(error), "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})
