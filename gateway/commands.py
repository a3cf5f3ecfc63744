"""The operator's verbs: each takes the settings of the installation and what the operator said."""

import argparse
import asyncio
import os
import re
import shutil
import subprocess  # runs psql with our own arguments  # nosec B404
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, unquote

from gateway import app, console, keys, model_names, strict_json
from gateway.address import split as address_parts
from gateway.backends import Backend
from gateway.catalog import Snapshot
from gateway.database import Database
from gateway.discovery import Discovery, poll, takes_token
from gateway.errors import CommandFailed, StoreUnavailable
from gateway.keys import KeyRing, NewKey
from gateway.quota import NAMES as LIMITS
from gateway.quota import UNLIMITED, Quota
from gateway.settings import Settings
from gateway.store import Store
from gateway.upstream import BackendFault

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
LIBPQ = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "database": "PGDATABASE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
}
LONGEST = timedelta(days=36_500)


def duration(text: str) -> timedelta:
    """`90s`, `15m`, `24h`, `30d`, `2w` or `0`."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])|0", text.strip())
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write 90s, 15m, 24h, 30d or 2w")
    length = timedelta(**{UNITS[found[2]]: int(found[1])}) if found[2] else timedelta()
    if length > LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is too long: write at most {LONGEST.days}d")
    return length


def lifetime(text: str) -> timedelta:
    length = duration(text)
    if not length:
        raise argparse.ArgumentTypeError("a key needs time to be used: write 15m, 24h, 30d, or leave it out for no end")
    return length


def limit(text: str) -> int | None:
    """A number, `unlimited`, or `unset` for the default."""
    if text in ("unset", "unlimited"):
        return UNLIMITED if text == "unlimited" else None
    if not re.fullmatch(r"\d{1,15}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no limit: write a whole number from 0, unlimited, or unset for the default"
        )
    return int(text)


def retention(text: str) -> timedelta:
    length = duration(text)
    if not length:
        raise argparse.ArgumentTypeError("nothing can be kept for no time: write 12h, 7d, 8w")
    return length


@asynccontextmanager
async def key_ring(settings: Settings) -> AsyncIterator[KeyRing]:
    async with app.database_of(settings) as database, Store(settings.redis_url) as store:
        if settings.has_private_database:
            await database.migrate(console.say)
        await require_schema(database)
        yield KeyRing(database, app.hasher_of(settings), store)


@asynccontextmanager
async def discovering(settings: Settings) -> AsyncIterator[tuple[Discovery, Store]]:
    async with (
        app.fleet(settings) as backends,
        Store(settings.redis_url) as store,
        app.discovery_of(settings, backends, store) as discovery,
    ):
        yield discovery, store


async def require_schema(database: Database) -> None:
    try:
        if not await database.is_current():
            raise CommandFailed("the database's schema is not current: run `make migrate`")
    except StoreUnavailable:
        raise CommandFailed("PostgreSQL does not answer: check DATABASE_URL and that the server runs") from None


async def migrate(settings: Settings, said: argparse.Namespace) -> None:
    async with app.database_of(settings) as database:
        try:
            applied = await database.migrate(console.say)
        except StoreUnavailable:
            raise CommandFailed("PostgreSQL does not answer: check DATABASE_URL and that the server runs") from None
    console.show_facts({"applied": applied, "schema": "current"}, as_json=said.json)


async def make_key(settings: Settings, said: argparse.Namespace) -> None:
    flags = [name for name in (keys.ADMIN_MODELS, keys.SHOW_BACKEND, keys.SHOW_OVERHEAD) if getattr(said, name)]
    wanted = NewKey(
        name=said.name,
        models=model_names.split_patterns(said.models),
        quota=Quota(**{name: getattr(said, name, None) for name in LIMITS}),
        flags=tuple(flags),
        lifetime=said.expires,
        prompt_log=said.prompt_log,
        prompt_retention=said.retention,
        audit_retention=said.audit_retention,
    )
    if said.retention and not said.prompt_log:
        raise CommandFailed(
            "RETENTION= is for the prompts that PROMPT_LOG=1 keeps: say both, or AUDIT_RETENTION= for audit rows"
        )
    async with key_ring(settings) as ring:
        key_id, whole = await ring.make(wanted)
    show_new_key(key_id, said.name, whole, as_json=said.json)


def show_new_key(key_id: str, name: str, whole: str, *, as_json: bool) -> None:
    if as_json:
        console.show_facts({"id": key_id, "name": name, "key": whole}, as_json=True)
    else:
        console.say(f"key {name} ({key_id}): shown this once, stored nowhere")
        print(whole)


async def list_keys(settings: Settings, said: argparse.Namespace) -> None:
    async with key_ring(settings) as ring:
        rows = await ring.all()
    console.show([_key_row(row) for row in rows], as_json=said.json, empty="no keys yet: `make key NAME=…` makes one")


def _key_row(row: Mapping[str, Any]) -> dict[str, Any]:
    now = datetime.now(UTC)
    has_expired = row["expires_at"] is not None and row["expires_at"] <= now
    state = "revoked" if row["revoked_at"] else "expired" if has_expired else "active"
    facts = {name: row[name] for name in ("id", "name", "models", *LIMITS, "rules", "flags", "prompt_log", "created_at")}
    facts |= {name: row[name] for name in ("expires_at", "last_used_at", "secrets")}
    facts["models"] = list(row["models"]) or ["(all)"]
    facts |= shown_limits(row)
    facts["rules"] = [_rule_words(rule) for rule in strict_json.read_loosely(row["rules"].encode())]
    return {**facts, "state": state}


def shown_limits(row: Mapping[str, Any]) -> dict[str, object]:
    """A limit as it was typed; None where the default applies."""
    return {name: "unlimited" if row[name] == UNLIMITED else row[name] for name in LIMITS}


def _rule_words(rule: Mapping[str, Any]) -> str:
    said = [f"{name}={value}" for name, value in shown_limits(rule).items() if value is not None]
    return f"{rule['pattern']}: {', '.join(said)}"


async def limit_key(settings: Settings, said: argparse.Namespace) -> None:
    wished = {name: getattr(said, name) for name in LIMITS if name in said}
    if not wished:
        raise CommandFailed(
            "say at least one of RPM= TPM= CONCURRENT= DAY= MONTH=: a number, unlimited, or unset for the default"
        )
    async with key_ring(settings) as ring:
        key_id, found, at_once = await ring.limit(said.key, said.model, wished)
    effect = "at once" if at_once else f"within {settings.redis_key_cache_ttl_s:g} s (Redis did not answer)"
    whose = {"key": key_id, **({"model": said.model} if said.model else {})}
    console.show_facts({**whose, **shown_limits(found.packed()), "everywhere": effect}, as_json=said.json)


async def rotate_key(settings: Settings, said: argparse.Namespace) -> None:
    async with key_ring(settings) as ring:
        key_id, whole = await ring.rotate(said.key, said.overlap)
    show_new_key(key_id, said.key, whole, as_json=said.json)


async def revoke_key(settings: Settings, said: argparse.Namespace) -> None:
    async with key_ring(settings) as ring:
        key_id, at_once = await ring.revoke(said.key)
    effect = "at once" if at_once else f"within {settings.redis_key_cache_ttl_s:g} s (Redis did not answer)"
    console.show_facts({"revoked": key_id, "everywhere": effect}, as_json=said.json)


async def list_models(settings: Settings, said: argparse.Namespace) -> None:
    async with discovering(settings) as (discovery, _):
        stored = await discovery.stored_map()
        catalog = discovery.catalog
    rows = [
        {"backend": snapshot.backend, "model": entry["name"], "size": _size(entry["size"]), "state": _state(snapshot)}
        for snapshot in catalog.snapshots
        for entry in snapshot.models
    ]
    facts = {
        "models": len(catalog.models),
        "map_age_s": round(time.time() - stored[0], 1) if stored else None,
        "map_bytes": stored[1] if stored else None,
    }
    if said.json:
        console.show_facts({**facts, "backends": rows}, as_json=True)
        return
    console.show(rows, as_json=False, empty="no backend has a model (see `make probe`)")
    age = f"map in Redis: {facts['map_age_s']} s old, {facts['map_bytes']} bytes" if stored else "no map in Redis"
    print(f"\n{facts['models']} different models; {age}")


def _state(snapshot: Snapshot) -> str:
    return f"away: {snapshot.error}" if snapshot.error else "up"


def _size(count: object) -> str:
    if not isinstance(count, int) or count <= 0:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"


async def refresh(settings: Settings, said: argparse.Namespace) -> None:
    """Ask every backend now; the running gateways take the new map at once."""
    async with discovering(settings) as (discovery, store):
        await discovery.refresh()
        rows = [
            {"backend": snapshot.backend, "models": len(snapshot.models), "state": _state(snapshot)}
            for snapshot in discovery.catalog.snapshots
        ]
        told = store.up
    console.show(rows, as_json=said.json, empty="no backends")
    if not told:
        console.say("Redis does not answer: running gateways refresh by themselves")


async def probe(settings: Settings, said: argparse.Namespace) -> None:
    async with app.fleet(settings) as backends:
        rows = await asyncio.gather(*(probe_row(backend) for backend in backends.values()))
    console.show(rows, as_json=said.json, empty="no backends")
    if any(row["problem"] for row in rows):
        raise CommandFailed("not every backend can be used: see its problem above")


async def probe_row(backend: Backend) -> dict[str, Any]:
    facts: dict[str, Any] = {"backend": backend.name, "kind": backend.kind, "address": backend.config.base_url}
    has_token = bool(backend.config.auth_token)
    try:
        found = await poll(backend)
        is_open = await takes_token(backend)
    except BackendFault as fault:
        refused = fault.reason == "token_refused"
        verdict = {"token": _token_words(has_token, is_open=False) if refused else None, "problem": str(fault)}
        return {**facts, "reachable": refused, "latency_ms": None, "version": None, "models": None, **verdict}
    seen = {"latency_ms": found.latency_ms, "version": found.version or None, "models": len(found.models)}
    problem = None if is_open else "refuses to answer calls"
    return {**facts, "reachable": True, **seen, "token": _token_words(has_token, is_open=is_open), "problem": problem}


def _token_words(has_token: bool, *, is_open: bool) -> str:
    if has_token:
        return "accepted" if is_open else "REFUSED"
    return "none needed" if is_open else "MISSING"


async def show_config(settings: Settings, said: argparse.Namespace) -> None:
    rows = [{"name": name, "value": value, "from": source} for name, value, source in settings.shown()]
    console.show(rows, as_json=said.json, empty="")


def psql(settings: Settings, arguments: Sequence[str]) -> int:
    """The database's own shell; the password travels in the environment, where `ps` does not show it."""
    program = shutil.which("psql")
    if program is None:
        raise CommandFailed("psql is not installed: install PostgreSQL's client (Debian: postgresql-client)")
    return subprocess.call([program, *arguments], env={**os.environ, **_libpq(settings.database_url)})  # nosec B603


def _libpq(address: str) -> dict[str, str]:
    """The variables that say to PostgreSQL's own programs what the address says."""
    parts = address_parts(address)
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts = [place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "") for place in places.split(",")]
    said = {
        "PGHOST": ",".join(host.strip("[]") for host, _, _ in hosts),
        "PGPORT": ",".join(port for _, _, port in hosts).strip(","),
        "PGUSER": unquote(user),
        "PGPASSWORD": unquote(password),
        "PGDATABASE": unquote(parts.path.lstrip("/")),
    }
    asked = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    said |= {variable: asked[name] for name, variable in LIBPQ.items() if name in asked}
    return {name: value for name, value in said.items() if value}
