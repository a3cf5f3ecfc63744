"""`/admin/v1/keys`: list, create, limit, rotate and revoke keys."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.admin import values
from gateway.admin.endpoint import AdminRequest
from gateway.auth import key_view
from gateway.auth.key import ADMIN, FLAGS, OPTIONS
from gateway.auth.key_store import KeyStore, NewKey
from gateway.core.errors import BadRequest
from gateway.dialects import model_names
from gateway.limits.quota import NAMES as LIMITS
from gateway.limits.quota import UNLIMITED, Quota

NEW_KEY = frozenset(
    {"name", "models", "role", "expires", "prompt_log", "retention", "audit_retention", *FLAGS, *LIMITS, *OPTIONS}
)


class KeyHandlers:
    """Paths name a key by its id alone: a request that is sent twice must not reach another key the second time."""

    def __init__(self, key_store: KeyStore) -> None:
        self._key_store = key_store

    async def list_all(self, request: AdminRequest) -> list[dict[str, Any]]:
        return [key_view.of_row(row) for row in await self._key_store.all()]

    async def create(self, request: AdminRequest) -> dict[str, Any]:
        wanted = new_key(request.body)
        request.note_action(f"make key {wanted.name}")
        key_id, whole = await self._key_store.make(wanted)
        return {"id": key_id, "name": wanted.name, "key": whole}

    async def limit(self, request: AdminRequest) -> dict[str, Any]:
        limits, pattern = {**limits_of(request.body), **options_of(request.body)}, text_of(request.body, "model")
        if not limits:
            names = ", ".join((*LIMITS, *OPTIONS))
            raise BadRequest(f'set at least one of {names}: a number, "unlimited", or null for the default')
        request.note_action(f"limit key {request.path['id']} {pattern}".rstrip())
        key_id, found, at_once = await self._key_store.limit(request.path["id"], pattern, limits, by_id=True)
        return {"id": key_id, "model": pattern, **key_view.shown_limits(found), "everywhere_at_once": at_once}

    async def rotate(self, request: AdminRequest) -> dict[str, Any]:
        overlap = values.duration(text_of(request.body, "overlap") or "24h")
        request.note_action(f"rotate key {request.path['id']}")
        key_id, whole = await self._key_store.rotate(request.path["id"], overlap, by_id=True)
        return {"id": key_id, "key": whole, "old_secrets_end": datetime.now(UTC) + overlap}

    async def revoke(self, request: AdminRequest) -> dict[str, Any]:
        request.note_action(f"revoke key {request.path['id']}")
        key_id, at_once = await self._key_store.revoke(request.path["id"], by_id=True)
        return {"id": key_id, "revoked": True, "everywhere_at_once": at_once}


def text_of(body: Mapping[str, Any], name: str) -> str:
    """Empty where the field is left out. An empty string, which a script may send by mistake, must not mean all or forever."""
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"the field {name!r} must be a string with text in it, or left out")
    return value


def limits_of(body: Mapping[str, Any]) -> dict[str, int | None]:
    """Those in the body: a number, "unlimited", or null for the default."""
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


def options_of(body: Mapping[str, Any]) -> dict[str, float | None]:
    """Those in the body: a number, or null for the default."""
    return {name: _option(name, body[name]) for name in OPTIONS if name in body}


def _option(name: str, value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not values.is_option(name, value):
        raise BadRequest(f"the field {name!r} must be {values.OPTIONS[name]}, or null for the default")
    return float(value)


def new_key(body: Mapping[str, Any]) -> NewKey:
    models = [] if body.get("models") is None else body["models"]
    if not isinstance(models, list) or not all(
        isinstance(model, str) and model_names.split_patterns(model) == (model,) for model in models
    ):
        raise BadRequest("the field 'models' must be a list of names or globs; an empty list allows all")
    if body.get("role") not in (None, "user", ADMIN):
        raise BadRequest('the field \'role\' must be "user" or "admin"')
    for name in ("prompt_log", *FLAGS):
        if not isinstance(body.get(name, False), bool):
            raise BadRequest(f"the field {name!r} must be true or false")
    periods: dict[str, timedelta | None] = {
        name: values.lifetime(text) if (text := text_of(body, name)) else None
        for name in ("expires", "retention", "audit_retention")
    }
    options = {name: value for name, value in options_of(body).items() if value is not None}
    if periods["retention"] and not body.get("prompt_log"):
        raise BadRequest("'retention' is for the prompts that 'prompt_log' keeps: set both, or use 'audit_retention'")
    return NewKey(
        name=text_of(body, "name"),
        models=model_names.split_patterns(" ".join(models)),
        quota=Quota(**limits_of(body)),
        flags=(*(flag for flag in FLAGS if body.get(flag)), *((ADMIN,) if body.get("role") == ADMIN else ())),
        lifetime=periods["expires"],
        prompt_log=bool(body.get("prompt_log")),
        prompt_retention=periods["retention"],
        audit_retention=periods["audit_retention"],
        **options,
    )
