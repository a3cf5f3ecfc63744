"""The verbs for keys: create, list, limit, rotate, revoke."""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway.auth import key_view
from gateway.auth.key import ADMIN, FLAGS, OPTIONS
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import hasher_of
from gateway.core.errors import CommandFailed
from gateway.dialects import model_names
from gateway.limits.quota import NAMES as LIMITS
from gateway.limits.quota import Quota
from gateway.ops.cli import console
from gateway.ops.cli.database import current_database
from gateway.settings import Settings
from gateway.stores.redis_client import RedisClient


@asynccontextmanager
async def open_key_store(settings: Settings) -> AsyncIterator[KeyStore]:
    async with current_database(settings) as database, RedisClient(settings.redis_url) as store:
        yield KeyStore(database, hasher_of(settings), store)


async def make_key(settings: Settings, arguments: argparse.Namespace) -> None:
    flags = [name for name in FLAGS if getattr(arguments, name)]
    flags += [ADMIN] if arguments.role == ADMIN else []
    wanted = NewKey(
        name=arguments.name,
        models=model_names.split_patterns(arguments.models),
        quota=Quota(**{name: getattr(arguments, name, None) for name in LIMITS}),
        flags=tuple(flags),
        lifetime=arguments.expires,
        prompt_log=arguments.prompt_log,
        prompt_retention=arguments.retention,
        audit_retention=arguments.audit_retention,
        weight=arguments.weight or 1.0,
        heartbeat_after_s=arguments.heartbeat_after_s,
    )
    if arguments.retention and not arguments.prompt_log:
        raise CommandFailed(
            "RETENTION= is for the prompts that PROMPT_LOG=1 keeps: set both, or use AUDIT_RETENTION= for audit rows"
        )
    async with open_key_store(settings) as key_store:
        key_id, whole = await key_store.make(wanted)
    show_new_key(key_id, arguments.name, whole, as_json=arguments.json)


def show_new_key(key_id: str, name: str, whole: str, *, as_json: bool) -> None:
    if as_json:
        console.show_facts({"id": key_id, "name": name, "key": whole}, as_json=True)
    else:
        console.notify(f"key {name} ({key_id}): shown only once; only its hash is stored")
        print(whole)


async def list_keys(settings: Settings, arguments: argparse.Namespace) -> None:
    async with open_key_store(settings) as key_store:
        rows = await key_store.all()
    console.show(
        [key_view.of_row(row) for row in rows], as_json=arguments.json, empty="no keys yet: `make key NAME=…` creates one"
    )


async def limit_key(settings: Settings, arguments: argparse.Namespace) -> None:
    names = (*LIMITS, *OPTIONS)
    wished = {name: getattr(arguments, name) for name in names if name in arguments}
    if not wished:
        written = " ".join(f"{name.upper()}=" for name in names)
        raise CommandFailed(f"set at least one of {written}: a number, unlimited, or unset for the default")
    async with open_key_store(settings) as key_store:
        key_id, found, at_once = await key_store.limit(arguments.key, arguments.model, wished)
    effect = "at once" if at_once else f"within {settings.redis_key_cache_ttl_s:g} s (Redis did not answer)"
    whose = {"key": key_id, **({"model": arguments.model} if arguments.model else {})}
    console.show_facts({**whose, **key_view.shown_limits(found), "everywhere": effect}, as_json=arguments.json)


async def rotate_key(settings: Settings, arguments: argparse.Namespace) -> None:
    async with open_key_store(settings) as key_store:
        key_id, whole = await key_store.rotate(arguments.key, arguments.overlap)
    show_new_key(key_id, arguments.key, whole, as_json=arguments.json)


async def revoke_key(settings: Settings, arguments: argparse.Namespace) -> None:
    async with open_key_store(settings) as key_store:
        key_id, at_once = await key_store.revoke(arguments.key)
    effect = "at once" if at_once else f"within {settings.redis_key_cache_ttl_s:g} s (Redis did not answer)"
    console.show_facts({"revoked": key_id, "everywhere": effect}, as_json=arguments.json)
