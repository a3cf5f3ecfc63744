"""The admin API's reports: the overview and its series, requests in the audit, usage, and explanations of calls."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway.admin import values
from gateway.admin.endpoint import AdminRequest
from gateway.admin.explain import Question, operation_of
from gateway.admin.overview import WINDOWS, Overview
from gateway.audit import reports
from gateway.audit.reports import AuditFilter
from gateway.auth.key_store import KeyStore
from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Operation
from gateway.stores.postgres import ReportDatabase

MOST_ROWS, USUAL_ROWS = 1000, 100

Explain = Callable[[Question], Awaitable[dict[str, Any]]]


class ReportHandlers:
    def __init__(
        self,
        overview: Overview,
        database: ReportDatabase,
        key_store: KeyStore,
        operations: Mapping[str, Operation],
        explain: Explain,
    ) -> None:
        self._overview, self._database, self._key_store = overview, database, key_store
        self._operations, self._explain = operations, explain

    async def overview(self, request: AdminRequest) -> dict[str, Any]:
        return await self._overview.now()

    async def series(self, request: AdminRequest) -> dict[str, Any]:
        window = request.query.get("window", "15m")
        if window not in WINDOWS:
            raise BadRequest(f"window must be one of {', '.join(WINDOWS)}")
        return await self._overview.series(window)

    async def audit(self, request: AdminRequest) -> list[dict[str, Any]]:
        query = request.query
        wanted = AuditFilter(
            key_id=(await reports.key_named(self._database, query["key"]))["id"] if "key" in query else None,
            models=values.model_filter(query["model"]) if "model" in query else None,
            since=values.since(query["since"]) if "since" in query else None,
            status=values.status(query["status"]) if "status" in query else None,
            outcome=values.words(query["outcome"]) if "outcome" in query else None,
            limit=min(MOST_ROWS, values.count(query["limit"])) if "limit" in query else USUAL_ROWS,
        )
        return await reports.requests(self._database, wanted)

    async def trace(self, request: AdminRequest) -> list[dict[str, Any]]:
        since = values.since(request.query["since"]) if "since" in request.query else reports.EPOCH
        return await reports.trace(self._database, request.path["id"], since, MOST_ROWS)

    async def usage(self, request: AdminRequest) -> list[dict[str, Any]]:
        by, since = values.groups(request.query.get("by", "key")), values.since(request.query.get("since", "30d"))
        return await reports.usage(self._database, by, since)

    async def explain(self, request: AdminRequest) -> dict[str, Any]:
        query = request.query
        key, model = query.get("key"), query.get("model")
        if not key or not model:
            raise BadRequest("set key= to a key's id or name, and model= to a model")
        operation, name = operation_of(query.get("client", "openai"), self._operations), values.model_name(model)
        prompt, output = values.tokens(query.get("prompt", "1")), values.tokens(query["output"]) if "output" in query else None
        return await self._explain(Question(await self._key_store.active_key(key), name, operation, prompt, output))
