"""`/metrics`, for callers with the token or from an allowed address; for all others the path does not exist."""

import hmac
from collections.abc import Sequence
from ipaddress import ip_address, ip_network

from starlette.types import Receive, Scope, Send

from gateway.audit.record import Record
from gateway.auth import key_format
from gateway.core.asgi import SAME_ORIGIN
from gateway.core.errors import ConflictingKeys, MissingKey, UnknownRoute
from gateway.telemetry.metrics import CONTENT_TYPE, Metrics


class MetricsEndpoint:
    def __init__(self, metrics: Metrics, token: str, allowed: Sequence[str]) -> None:
        self._metrics, self._token = metrics, token.encode()
        self._allowed = [ip_network(entry, strict=False) for entry in allowed]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        is_asked = scope["method"] in ("GET", "HEAD")
        if not is_asked or not (self._has_token(scope) or self._may_come(record.client)):
            record.route = "unmatched"
            raise UnknownRoute
        body = await self._metrics.exposition()
        headers = [(b"content-type", CONTENT_TYPE.encode()), (b"content-length", b"%d" % len(body)), *SAME_ORIGIN]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _has_token(self, scope: Scope) -> bool:
        try:
            presented = key_format.find(scope["headers"], None)
        except (MissingKey, ConflictingKeys):
            return False
        return bool(self._token) and hmac.compare_digest(presented.encode(), self._token)

    def _may_come(self, client: str) -> bool:
        try:
            address = ip_address(client)
        except ValueError:
            return False
        return any(address in network for network in self._allowed)
