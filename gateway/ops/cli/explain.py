"""`explain`: where a call would be sent now, and why."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

from gateway.admin.explain import Fleet, Question, explain, operation_of
from gateway.auth.key_store import KeyStore
from gateway.components import default_quota, hasher_of
from gateway.dialects import registry
from gateway.fleet import presence
from gateway.limits import limiter
from gateway.limits.admission import duration
from gateway.limits.budgets import Budgets
from gateway.limits.limiter import Limiter
from gateway.ops.cli import console
from gateway.ops.cli.backends import discovering
from gateway.ops.cli.database import current_database
from gateway.settings import Settings
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_scripts import read_scripts
from gateway.stores.redis_shards import ShardConnections


async def explain_call(settings: Settings, arguments: argparse.Namespace) -> None:
    operation = operation_of(arguments.client, registry.operations(registry.dialects()))
    async with (
        discovering(settings) as (discovery, store, configs),
        current_database(settings) as database,
        ShardConnections(settings.redis_url, read_scripts(limiter.LUA), lambda _: None) as connections,
    ):
        key_store = KeyStore(database, hasher_of(settings), store)
        question = Question(await key_store.active_key(arguments.key), arguments.model, operation)
        states, processes = await _states(store)
        drained = frozenset(row["backend"] for row in await database.rows("drained_backends"))
        fleet = Fleet(configs, states, drained, discovery.catalog)
        limits = Limiter(connections, Budgets(database, store).seed, most_output=settings.max_num_predict)
        defaults, most = default_quota(settings), settings.max_num_predict
        found = {**await explain(question, fleet, limits, defaults, most), "processes": processes}
    if arguments.json:
        console.show_facts(found, as_json=True)
    else:
        _show(found)


async def _states(store: RedisClient) -> tuple[dict[str, presence.BackendState], int | None]:
    """How the running gateways see the backends, and how many processes there are."""
    try:
        states = await presence.read(store)
    except RedisUnavailable:
        return {}, None
    return presence.merged_view(states), len(states)


def _show(found: Mapping[str, Any]) -> None:
    known = "known" if found["model_is_known"] else "NOT KNOWN to any backend"
    allowed = "may use it" if found["key_may_use_it"] else "may NOT use it"
    print(f"{found['route']} for {found['model']} ({found['canonical']}): {known}; the key {found['key']['name']} {allowed}")
    if found["alias_of"]:
        print(f"it is an alias of {', then '.join(found['alias_of'])}")
    print()
    rows = [
        {"try": row["order"], "backend": row["backend"], **_as(found, row), "breaker": row["breaker"], **_load(row)}
        | {"why": _why(row)}
        for row in sorted(found["backends"], key=lambda row: row["order"] or 10**6)
    ]
    console.show(rows, as_json=False, empty="no backends")
    print()
    limits = [{**line, "left": _left(line)} for line in found["limits"]]
    console.show(limits, as_json=False, empty="no limits")
    print(f"limits are decided by {found['limits_decided_by']}")
    print(f"\nmost tokens of an answer: {found['most_tokens']}")
    print(f"running processes: {'unknown, Redis is unreachable' if found['processes'] is None else found['processes']}")
    print(f"\nnow it would be {_verdict(found)}")


def _as(found: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, str]:
    return {"model": row["spelling"] or "-"} if found["alias_of"] else {}


def _why(row: Mapping[str, Any]) -> str:
    return f"{row['why']}; translated to {row['translated_to']}" if row["serves"] and row["translated_to"] else str(row["why"])


def _load(row: Mapping[str, Any]) -> dict[str, str]:
    return {"in_flight": f"{row['in_flight']}/{row['max_connections']}"}


def _left(line: Mapping[str, Any]) -> float | None:
    return None if line["used"] is None else round(max(0, line["of"] - line["used"]), 3)


def _verdict(found: Mapping[str, Any]) -> str:
    if found["status"] == 200:
        return f"sent to {found['backend']}"
    if found["refused_by"]:
        wait_s = found["passes_in_s"]
        passes = "never passes as it is" if wait_s is None else f"passes in about {duration(math.ceil(wait_s) * 1000)}"
        return f"refused with 429 {found['outcome']}: {found['refused_by']} is reached; it {passes}"
    is_gone = not found["model_is_known"] and found["status"] in (403, 404)
    why = ": no backend has this model, `make models` lists all models" if is_gone else ""
    return f"refused with {found['status']} {found['outcome']}{why}"
