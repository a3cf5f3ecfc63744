"""`/admin/v1`: what operators see and do, for scripts and for the pages; for keys with the role `admin`.

Who asks shows a key in a header, never a cookie, so that no other page can ask in somebody's name. What an operator does is in
the audit, `detail` has what it did to what; so is whatever was refused for want of the role. Looking is no traffic: it is in no
audit, no figure and no metric.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin import values
from gateway.admin.events import AdminEvents
from gateway.admin.explain import Question
from gateway.admin.overview import WINDOWS, Overview
from gateway.admin.values import BadValue
from gateway.audit import reports
from gateway.audit.record import Record
from gateway.audit.reports import AuditFilter
from gateway.auth import key_format, key_view
from gateway.auth.key import ADMIN, ADMIN_MODELS, SHOW_BACKEND, SHOW_OVERHEAD, Key, unpack
from gateway.auth.key_store import KeyStore, NewKey
from gateway.core import strict_json
from gateway.core.asgi import send_json
from gateway.core.cancel_scope import ScopeTimer
from gateway.core.errors import AlreadyThere, BadRequest, CommandFailed, NameTaken, NoSuchThing, NotThere
from gateway.core.in_flight import InFlight
from gateway.dialects import model_names
from gateway.dialects.dialect import Operation
from gateway.fleet import drains
from gateway.fleet import probe as fleet_probe
from gateway.fleet.backends.backend import Backend
from gateway.fleet.discovery import Discovery
from gateway.limits.quota import NAMES as LIMITS
from gateway.limits.quota import UNLIMITED, Quota
from gateway.proxy.access import Access
from gateway.proxy.body import Bodies
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient

LONGEST_BODY = 65_536
LONGEST_VALUE, MOST_VALUES = 1000, 50
MOST_ROWS, USUAL_ROWS = 1000, 100
CHATS = {"ollama": "/api/chat", "openai": "/v1/chat/completions"}
FLAGS = {
    "admin_models": ADMIN_MODELS,
    "show_backend": SHOW_BACKEND,
    "show_overhead": SHOW_OVERHEAD,
}
NEW_KEY = frozenset({"name", "models", "role", "expires", "prompt_log", "retention", "audit_retention", *FLAGS, *LIMITS})

Explain = Callable[[Question], Awaitable[dict[str, Any]]]


@dataclass
class Asked:
    """One request of an operator, read."""

    key: Key
    path: Mapping[str, str]
    query: dict[str, str]
    body: dict[str, Any]
    record: Record

    def did(self, what: str) -> None:
        """For the audit."""
        self.record.detail = key_format.redacted(what)[:200]


Handler = Callable[[Asked], Awaitable[Any]]


class AdminRoute:
    """The ASGI endpoint of one handler; `takes` are the names that its query or body may have."""

    def __init__(
        self,
        access: Access,
        watch: ScopeTimer,
        bodies: Bodies,
        handler: Handler,
        *,
        takes: Collection[str] = (),
        has_body: bool = False,
        status: int = 200,
    ) -> None:
        self._access, self._watch, self._bodies, self._handler = access, watch, bodies, handler
        self.takes, self.has_body, self.status = takes, has_body, status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        key = await self._access.operator(scope, record)
        body: dict[str, Any] = {}
        if self.has_body:
            with self._watch.guard() as guard:
                body = strict_json.read_object(await self._bodies.read(scope, receive, record, guard, LONGEST_BODY))
        query, path = _query(scope), scope.get("path_params", {})
        self._refuse_unknown(query if not self.has_body else body)
        _refuse_long({**query, **path, **body})
        answer = await self._answer(Asked(key, path, query, body, record))
        await send_json(send, answer, self.status)

    def _refuse_unknown(self, said: Mapping[str, Any]) -> None:
        for name in said.keys() - set(self.takes):
            raise BadRequest(f"{name[:64]!a} is not taken here: {', '.join(sorted(self.takes)) or 'nothing is'}")

    async def _answer(self, asked: Asked) -> Any:
        try:
            return await self._handler(asked)
        except NotThere as wrong:
            raise NoSuchThing(str(wrong)) from wrong
        except NameTaken as wrong:
            raise AlreadyThere(str(wrong)) from wrong
        except (CommandFailed, BadValue) as wrong:
            raise BadRequest(str(wrong)) from wrong


def _query(scope: Scope) -> dict[str, str]:
    try:
        return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_VALUES))
    except ValueError:
        raise BadRequest(f"the query has more than {MOST_VALUES} values") from None


def _refuse_long(said: Mapping[str, Any]) -> None:
    """Before anything looks at what was said: lists have bounds of their own."""
    for name, value in said.items():
        if isinstance(value, str) and len(value) > LONGEST_VALUE:
            raise BadRequest(f"{name!r} is longer than {LONGEST_VALUE} characters")


class AdminApi:
    """The handlers, by method and path."""

    def __init__(
        self,
        key_store: KeyStore,
        overview: Overview,
        database: Database,
        reports: Database,
        store: RedisClient,
        discovery: Discovery,
        backends: Mapping[str, Backend],
        operations: Mapping[str, Operation],
        explain: Explain,
        in_flight: InFlight,
    ) -> None:
        self._key_store, self.at_a_glance, self._database, self._reports, self._store = (
            key_store,
            overview,
            database,
            reports,
            store,
        )
        self._discovery, self._backends, self._operations, self._explain = discovery, backends, operations, explain
        self._in_flight = in_flight

    def routes(self, access: Access, watch: ScopeTimer, bodies: Bodies) -> dict[tuple[str, str], ASGIApp]:
        def route(handler: Handler, *takes: str, **how: Any) -> AdminRoute:
            return AdminRoute(access, watch, bodies, handler, takes=takes, **how)

        return {
            ("GET", "/admin/v1/overview"): route(self.overview),
            ("GET", "/admin/v1/events"): AdminEvents(access, watch, self.at_a_glance, self._in_flight),
            ("GET", "/admin/v1/series"): route(self.series, "window"),
            ("GET", "/admin/v1/backends"): route(self.backends),
            ("POST", "/admin/v1/backends/{name}/drain"): route(self.drain),
            ("POST", "/admin/v1/backends/{name}/undrain"): route(self.undrain),
            ("POST", "/admin/v1/backends/{name}/probe"): route(self.probe),
            ("POST", "/admin/v1/refresh"): route(self.refresh),
            ("GET", "/admin/v1/keys"): route(self.keys),
            ("POST", "/admin/v1/keys"): route(self.make_key, *NEW_KEY, has_body=True, status=201),
            ("PATCH", "/admin/v1/keys/{id}"): route(self.limit_key, "model", *LIMITS, has_body=True),
            ("POST", "/admin/v1/keys/{id}/rotate"): route(self.rotate_key, "overlap", has_body=True, status=201),
            ("DELETE", "/admin/v1/keys/{id}"): route(self.revoke_key),
            ("GET", "/admin/v1/audit"): route(self.audit, "key", "model", "since", "status", "outcome", "limit"),
            ("GET", "/admin/v1/requests/{id}"): route(self.trace, "since"),
            ("GET", "/admin/v1/usage"): route(self.usage, "by", "since"),
            ("GET", "/admin/v1/explain"): route(self.explain, "key", "model", "client"),
        }

    async def overview(self, asked: Asked) -> dict[str, Any]:
        return await self.at_a_glance.now()

    async def series(self, asked: Asked) -> dict[str, Any]:
        window = asked.query.get("window", "15m")
        if window not in WINDOWS:
            raise BadRequest(f"window must be one of {', '.join(WINDOWS)}")
        return await self.at_a_glance.series(window)

    async def backends(self, asked: Asked) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.at_a_glance.now())["backends"]
        return found

    async def drain(self, asked: Asked) -> dict[str, Any]:
        return await self._mark(asked, drained=True)

    async def undrain(self, asked: Asked) -> dict[str, Any]:
        return await self._mark(asked, drained=False)

    async def _mark(self, asked: Asked, *, drained: bool) -> dict[str, Any]:
        name = self._backend(asked).name
        asked.did(f"{'drain' if drained else 'undrain'} {name}")
        at_once = await drains.mark(self._database, self._store, name, drained=drained, by=asked.key.id)
        return {"backend": name, "drained": drained, "everywhere_at_once": at_once}

    async def probe(self, asked: Asked) -> dict[str, Any]:
        backend = self._backend(asked)
        asked.did(f"probe {backend.name}")
        return await fleet_probe.probe(backend)

    def _backend(self, asked: Asked) -> Backend:
        backend = self._backends.get(asked.path["name"])
        if backend is None:
            raise NoSuchThing(f"there is no backend {asked.path['name'][:64]!a}")
        return backend

    async def refresh(self, asked: Asked) -> dict[str, Any]:
        asked.did("refresh")
        await self._discovery.refresh()
        catalog = self._discovery.catalog
        rows = [{"backend": found.backend, "models": len(found.models), "error": found.error} for found in catalog.snapshots]
        return {"models": len(catalog.models), "backends": rows}

    async def keys(self, asked: Asked) -> list[dict[str, Any]]:
        return [key_view.of_row(row) for row in await self._key_store.all()]

    async def make_key(self, asked: Asked) -> dict[str, Any]:
        wanted = new_key(asked.body)
        asked.did(f"make key {wanted.name}")
        key_id, whole = await self._key_store.make(wanted)
        return {"id": key_id, "name": wanted.name, "key": whole}

    async def limit_key(self, asked: Asked) -> dict[str, Any]:
        wished = limits_of(asked.body)
        pattern = text_of(asked.body, "model")
        if not wished:
            raise BadRequest(f'say at least one of {", ".join(LIMITS)}: a number, "unlimited", or null for the default')
        asked.did(f"limit key {asked.path['id']} {pattern}".rstrip())
        key_id, found, at_once = await self._key_store.limit(await self._key_id(asked), pattern, wished)
        return {"id": key_id, "model": pattern, **key_view.shown_limits(found.packed()), "everywhere_at_once": at_once}

    async def rotate_key(self, asked: Asked) -> dict[str, Any]:
        overlap = values.duration(text_of(asked.body, "overlap") or "24h")
        asked.did(f"rotate key {asked.path['id']}")
        key_id, whole = await self._key_store.rotate(await self._key_id(asked), overlap)
        return {"id": key_id, "key": whole, "old_secrets_end": datetime.now(UTC) + overlap}

    async def revoke_key(self, asked: Asked) -> dict[str, Any]:
        asked.did(f"revoke key {asked.path['id']}")
        key_id, at_once = await self._key_store.revoke(await self._key_id(asked))
        return {"id": key_id, "revoked": True, "everywhere_at_once": at_once}

    async def _key_id(self, asked: Asked) -> str:
        """Paths name keys by their ids alone: a request that is sent twice must not mean another key the second time."""
        return await self._key_store.living_by_id(asked.path["id"])

    async def audit(self, asked: Asked) -> list[dict[str, Any]]:
        query = asked.query
        wanted = AuditFilter(
            key_id=(await reports.key_named(self._database, query["key"]))["id"] if "key" in query else None,
            models=values.model_filter(query["model"]) if "model" in query else None,
            since=values.since(query["since"]) if "since" in query else None,
            status=values.status(query["status"]) if "status" in query else None,
            outcome=values.words(query["outcome"]) if "outcome" in query else None,
            limit=min(MOST_ROWS, values.count(query["limit"])) if "limit" in query else USUAL_ROWS,
        )
        return await reports.requests(self._reports, wanted)

    async def trace(self, asked: Asked) -> list[dict[str, Any]]:
        since = values.since(asked.query["since"]) if "since" in asked.query else reports.EPOCH
        return await reports.trace(self._reports, asked.path["id"], since, MOST_ROWS)

    async def usage(self, asked: Asked) -> list[dict[str, Any]]:
        by = values.groups(asked.query.get("by", "key"))
        return await reports.usage(self._reports, by, values.since(asked.query.get("since", "30d")))

    async def explain(self, asked: Asked) -> dict[str, Any]:
        client, model = asked.query.get("client", "openai"), asked.query.get("model", "")
        path = CHATS.get(client, client)
        if path not in self._operations or not model or not asked.query.get("key"):
            routes = ", ".join(sorted(self._operations))
            raise BadRequest(f"say key= (id or name), model=, and client= as ollama, openai, or one of {routes}")
        values.model_name(model)
        row = await self._database.row("key_with_rights", await self._key_store.active_id(asked.query["key"]))
        assert row is not None
        return await self._explain(Question(unpack(dict(row)), model, self._operations[path]))


def text_of(body: Mapping[str, Any], name: str) -> str:
    """Empty where it is left out. What a script left empty by mistake must not mean all, or for ever."""
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"the field {name!r} must be a string that says something; leave it out otherwise")
    return value


def limits_of(body: Mapping[str, Any]) -> dict[str, int | None]:
    """Those that were said: a number, "unlimited", or null for the default."""
    found: dict[str, int | None] = {}
    for name in LIMITS:
        if name not in body:
            continue
        value = body[name]
        # JSON knows one kind of number: 60.0 is 60.
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15
        if value is not None and value != "unlimited" and not is_number:
            raise BadRequest(f'the field {name!r} must be a whole number from 0, "unlimited", or null for the default')
        found[name] = UNLIMITED if value == "unlimited" else value
    return found


def new_key(body: Mapping[str, Any]) -> NewKey:
    models = [] if body.get("models") is None else body["models"]
    if not isinstance(models, list) or not all(
        isinstance(model, str) and model_names.split_patterns(model) == (model,) for model in models
    ):
        raise BadRequest("the field 'models' must be a list of names or globs; none means all")
    if body.get("role") not in (None, "user", ADMIN):
        raise BadRequest('the field \'role\' must be "user" or "admin"')
    for name in ("prompt_log", *FLAGS):
        if not isinstance(body.get(name, False), bool):
            raise BadRequest(f"the field {name!r} must be true or false")
    flags = [flag for name, flag in FLAGS.items() if body.get(name)] + ([ADMIN] if body.get("role") == ADMIN else [])
    times: dict[str, timedelta | None] = {
        name: values.lifetime(said) if (said := text_of(body, name)) else None
        for name in ("expires", "retention", "audit_retention")
    }
    if times["retention"] and not body.get("prompt_log"):
        raise BadRequest(
            "'retention' is for the prompts that 'prompt_log' keeps: say both, or 'audit_retention' for audit rows"
        )
    return NewKey(
        name=text_of(body, "name"),
        models=model_names.split_patterns(" ".join(models)),
        quota=Quota(**limits_of(body)),
        flags=tuple(flags),
        lifetime=times["expires"],
        prompt_log=bool(body.get("prompt_log")),
        prompt_retention=times["retention"],
        audit_retention=times["audit_retention"],
    )
