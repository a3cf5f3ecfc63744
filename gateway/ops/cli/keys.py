"""The operator's verbs: each takes the settings of the installation and what the operator said."""

import argparse
import getpass
import os
import re
import shutil
import subprocess  # runs psql with our own arguments  # nosec B404
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, unquote

from gateway.auth import key_view
from gateway.auth.key import ADMIN, FLAGS
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import backends_of, database_of, discovery_of, hasher_of
from gateway.core.errors import CommandFailed, StoreUnavailable
from gateway.dialects import model_names
from gateway.fleet import control
from gateway.fleet import probe as fleet_probe
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.control import FleetFacts
from gateway.fleet.discovery import Discovery
from gateway.limits.quota import NAMES as LIMITS
from gateway.limits.quota import Quota
from gateway.ops.cli import console
from gateway.settings import Settings
from gateway.stores import migrations
from gateway.stores.postgres import Database, advice_for
from gateway.stores.redis_client import RedisClient
from gateway.stores.urls import split as address_parts

KEY_VARIABLE = "ADMIN_KEY"
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


@asynccontextmanager
async def open_key_store(settings: Settings) -> AsyncIterator[KeyStore]:
    async with database_of(settings) as database, RedisClient(settings.redis_url) as store:
        if settings.has_private_database:
            await migrations.migrate(database, console.say)
        await require_schema(database)
        yield KeyStore(database, hasher_of(settings), store)


@asynccontextmanager
async def running_fleet(settings: Settings) -> AsyncIterator[tuple[RedisClient, FleetFacts | None]]:
    """The store, and the backends of the running gateways where these settings have others: then the operator is told so."""
    async with RedisClient(settings.redis_url) as store:
        fleet = await control.other_fleet(store, settings.backends)
        if fleet is not None:
            console.say("these are the running gateway's backends; this command's own settings have others")
        yield store, fleet


@asynccontextmanager
async def discovering(settings: Settings) -> AsyncIterator[tuple[Discovery, RedisClient, Sequence[BackendConfig]]]:
    """The models of the backends, and which backends these are: those of the running gateways, else those of these settings."""
    async with running_fleet(settings) as (store, fleet):
        if fleet is not None:
            configs = control.configs_of(fleet)
            unopened = {config.name: Backend(config) for config in configs}
            yield await discovery_of(settings, unopened, store).only_stored(), store, configs
            return
        async with (
            backends_of(settings) as backends,
            discovery_of(settings, backends, store) as discovery,
        ):
            yield discovery, store, settings.backends


def admin_key() -> str:
    """A key for the admin API: from the environment, where `ps` does not show it, or asked for."""
    key = os.environ.get(KEY_VARIABLE) or (getpass.getpass("admin key: ") if sys.stdin.isatty() else "")
    if not key:
        raise CommandFailed(f"put a key into the environment as {KEY_VARIABLE}; `make key NAME=ops ROLE=admin` makes one")
    return key


async def require_schema(database: Database) -> None:
    try:
        if not await migrations.is_current(database):
            raise CommandFailed("the database's schema is not current: run `make migrate`")
    except StoreUnavailable as unavailable:
        raise CommandFailed(advice_for(unavailable)) from None


async def migrate(settings: Settings, said: argparse.Namespace) -> None:
    async with database_of(settings) as database:
        try:
            applied = await migrations.migrate(database, console.say)
        except StoreUnavailable as unavailable:
            raise CommandFailed(advice_for(unavailable)) from None
    console.show_facts({"applied": applied, "schema": "current"}, as_json=said.json)


async def make_key(settings: Settings, said: argparse.Namespace) -> None:
    flags = [name for name in FLAGS if getattr(said, name)]
    flags += [ADMIN] if said.role == ADMIN else []
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
    async with open_key_store(settings) as key_store:
        key_id, whole = await key_store.make(wanted)
    show_new_key(key_id, said.name, whole, as_json=said.json)


def show_new_key(key_id: str, name: str, whole: str, *, as_json: bool) -> None:
    if as_json:
        console.show_facts({"id": key_id, "name": name, "key": whole}, as_json=True)
    else:
        console.say(f"key {name} ({key_id}): shown this once, stored nowhere")
        print(whole)


async def list_keys(settings: Settings, said: argparse.Namespace) -> None:
    async with open_key_store(settings) as key_store:
        rows = await key_store.all()
    console.show([key_view.of_row(row) for row in rows], as_json=said.json, empty="no keys yet: `make key NAME=…` makes one")


async def limit_key(settings: Settings, said: argparse.Namespace) -> None:
    wished = {name: getattr(said, name) for name in LIMITS if name in said}
    if not wished:
        raise CommandFailed(
            "say at least one of RPM= TPM= CONCURRENT= DAY= MONTH=: a number, unlimited, or unset for the default"
        )
    async with open_key_store(settings) as key_store:
        key_id, found, at_once = await key_store.limit(said.key, said.model, wished)
    effect = "at once" if at_once else f"within {settings.redis_key_cache_ttl_s:g} s (Redis did not answer)"
    whose = {"key": key_id, **({"model": said.model} if said.model else {})}
    console.show_facts({**whose, **key_view.shown_limits(found.packed()), "everywhere": effect}, as_json=said.json)


async def rotate_key(settings: Settings, said: argparse.Namespace) -> None:
    async with open_key_store(settings) as key_store:
        key_id, whole = await key_store.rotate(said.key, said.overlap)
    show_new_key(key_id, said.key, whole, as_json=said.json)


async def revoke_key(settings: Settings, said: argparse.Namespace) -> None:
    async with open_key_store(settings) as key_store:
        key_id, at_once = await key_store.revoke(said.key)
    effect = "at once" if at_once else f"within {settings.redis_key_cache_ttl_s:g} s (Redis did not answer)"
    console.show_facts({"revoked": key_id, "everywhere": effect}, as_json=said.json)


async def list_models(settings: Settings, said: argparse.Namespace) -> None:
    async with discovering(settings) as (discovery, _, _):
        stored = await discovery.stored_map()
        catalog = discovery.catalog
    rows = [
        {"backend": snapshot.backend, "model": entry["name"], "size": _size(entry["size"]), "state": snapshot.state}
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


def _size(count: object) -> str:
    if not isinstance(count, int) or count <= 0:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"


async def refresh(settings: Settings, said: argparse.Namespace) -> None:
    """Ask every backend now; the running gateways take the new map at once."""
    async with running_fleet(settings) as (store, fleet):
        if fleet is not None:
            rows = await control.ask(store, fleet, "refresh")
        else:
            async with (
                backends_of(settings) as backends,
                discovery_of(settings, backends, store) as discovery,
            ):
                rows = await discovery.refreshed()
        told = store.up
    console.show(rows, as_json=said.json, empty="no backends")
    if not told:
        console.say("Redis does not answer: running gateways refresh by themselves")


async def probe(settings: Settings, said: argparse.Namespace) -> None:
    async with running_fleet(settings) as (store, fleet):
        if fleet is not None:
            rows = await control.ask(store, fleet, "probe")
        else:
            async with backends_of(settings) as backends:
                rows = await fleet_probe.probe_all(backends)
    console.show(rows, as_json=said.json, empty="no backends")
    if any(row["problem"] for row in rows):
        raise CommandFailed("not every backend can be used: see its problem above")


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
