"""The operator's verbs that say why: what would become of a call, and what became of one; and taking a backend out."""

import argparse
import math
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.admin.explain import Fleet, Question, explain, operation_of
from gateway.audit import reports
from gateway.auth.key_store import KeyStore
from gateway.components import default_quota, hasher_of
from gateway.core.errors import CommandFailed
from gateway.dialects import registry
from gateway.fleet import drains, presence
from gateway.limits import limiter
from gateway.limits.admission import duration
from gateway.limits.budgets import Budgets
from gateway.limits.limiter import Limiter
from gateway.ops.cli import audit, console, keys
from gateway.settings import Settings
from gateway.stores.redis_client import RedisClient, RedisUnavailable
from gateway.stores.redis_scripts import read_scripts
from gateway.stores.redis_shards import ShardConnections

OPERATOR = "operator"
MOST_ROWS = 20


async def explain_call(settings: Settings, said: argparse.Namespace) -> None:
    operation = operation_of(said.client, registry.operations(registry.dialects()))
    async with (
        keys.discovering(settings) as (discovery, store, configs),
        audit.current_database(settings) as database,
        ShardConnections(settings.redis_url, read_scripts(limiter.LUA), lambda _: None) as connections,
    ):
        key_store = KeyStore(database, hasher_of(settings), store)
        question = Question(await key_store.active_key(said.key), said.model, operation)
        states, told = await _states(store)
        drained = frozenset(row["backend"] for row in await database.rows("drained_backends"))
        fleet = Fleet(configs, states, drained, discovery.catalog)
        limits = Limiter(connections, Budgets(database, store).seed, most_output=settings.max_num_predict)
        defaults, most = default_quota(settings), settings.max_num_predict
        found = {**await explain(question, fleet, limits, defaults, most), "processes": told}
    if said.json:
        console.show_facts(found, as_json=True)
    else:
        _show(found)


async def _states(store: RedisClient) -> tuple[dict[str, presence.BackendState], int | None]:
    """How the running gateways see the backends, and how many processes say so."""
    try:
        states = await presence.read(store)
    except RedisUnavailable:
        return {}, None
    return presence.merged_view(states), len(states)


def _show(found: Mapping[str, Any]) -> None:
    known = "known" if found["model_is_known"] else "NOT KNOWN to any backend"
    allowed = "may use it" if found["key_may_use_it"] else "may NOT use it"
    print(f"{found['route']} for {found['model']} ({found['canonical']}): {known}; the key {found['key']['name']} {allowed}\n")
    rows = [
        {"try": row["order"], "backend": row["backend"], "breaker": row["breaker"], **_load(row), "why": row["why"]}
        for row in sorted(found["backends"], key=lambda row: row["order"] or 10**6)
    ]
    console.show(rows, as_json=False, empty="no backends")
    print()
    limits = [{**line, "left": _left(line)} for line in found["limits"]]
    console.show(limits, as_json=False, empty="no limits")
    print(f"limits are decided by {found['limits_decided_by']}")
    print(f"\nmost tokens of an answer: {found['most_tokens']}")
    print(f"running processes: {'unknown, Redis is away' if found['processes'] is None else found['processes']}")
    print(f"\nnow it would be {_verdict(found)}")


def _load(row: Mapping[str, Any]) -> dict[str, str]:
    return {"in_flight": f"{row['in_flight']}/{row['max_connections']}"}


def _left(line: Mapping[str, Any]) -> int | None:
    return None if line["used"] is None else max(0, line["of"] - line["used"])


def _verdict(found: Mapping[str, Any]) -> str:
    if found["status"] == 200:
        return f"sent to {found['backend']}"
    if found["refused_by"]:
        wait_s = found["passes_in_s"]
        passes = "never passes as it is" if wait_s is None else f"passes in about {duration(math.ceil(wait_s) * 1000)}"
        return f"refused with 429 {found['outcome']}: {found['refused_by']} is reached; it {passes}"
    is_gone = not found["model_is_known"] and found["status"] in (403, 404)
    why = ": no backend has this model, `make models` lists those there are" if is_gone else ""
    return f"refused with {found['status']} {found['outcome']}{why}"


async def trace(settings: Settings, said: argparse.Namespace) -> None:
    since = said.since or datetime.now(UTC) - timedelta(days=settings.audit_log_default_retention_days)
    async with audit.current_database(settings) as database:
        rows = await reports.trace(database, said.id, since, MOST_ROWS)
    if said.json:
        console.show(rows, as_json=True, empty="")
        return
    for number, row in enumerate(rows):
        print(("\n" if number else "") + "\n".join(_story(row)))


def _story(row: Mapping[str, Any]) -> Iterator[str]:
    stamp = row["at"].astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    yield f"request {row['request_id']} (id {row['id']})"
    yield f"  {stamp} UTC  {row['method']} {row['route']}, {row['bytes_in']} bytes"
    agent = console.cell(row["agent"] or "no agent named")
    yield f"  key      {row['key'] or '-'} ({row['key_id']}) from {row['client']}, {agent}"
    yield f"  model    {row['model'] or '-'}{', streamed' if row['stream'] else ''}"
    if row["queue_ms"]:
        yield f"  queue    waited {row['queue_ms']:.1f} ms for a slot of the key"
    for attempt in row["attempts"]:
        yield f"  attempt  {attempt['backend']}: {attempt['fault']}{_detail(attempt)} after {attempt['ms']:.1f} ms"
    if row["backend"]:
        yield f"  backend  {row['backend']}, as {row['answered_as'] or row['model']}"
    if row["ttfb_ms"] is not None:
        yield f"  first    byte after {row['ttfb_ms']:.1f} ms"
    tokens = f"{row['prompt_tokens']} prompt + {row['completion_tokens']} completion ({row['tokens_from']})"
    yield f"  tokens   {tokens}{_billed(row)}"
    ended = (
        "never ended by its process" if row["total_ms"] is None else f"after {row['total_ms']:.1f} ms, {row['bytes_out']} bytes"
    )
    yield f"  end      {row['status'] or '-'} {row['outcome']}{_detail(row)}, {ended}"


def _billed(row: Mapping[str, Any]) -> str:
    if row["cached_tokens"] is None:
        return ""
    counted = "all" if row["billed_tokens"] is None else row["billed_tokens"]
    return f", {row['cached_tokens']} of the prompt cached; {counted} count for limits"


def _detail(row: Mapping[str, Any]) -> str:
    return f" ({row['detail']})" if row.get("detail") else ""


async def drain_backend(settings: Settings, said: argparse.Namespace) -> None:
    await _mark(settings, said, drained=True)


async def undrain_backend(settings: Settings, said: argparse.Namespace) -> None:
    await _mark(settings, said, drained=False)


async def _mark(settings: Settings, said: argparse.Namespace, *, drained: bool) -> None:
    async with audit.current_database(settings) as database, keys.running_fleet(settings) as (store, fleet):
        names = [backend.name for backend in settings.backends] if fleet is None else [str(one["name"]) for one in fleet]
        if said.backend not in names:
            raise CommandFailed(f"there is no backend {said.backend!r}: write one of {', '.join(names)}")
        at_once = await drains.mark(database, store, said.backend, drained=drained, by=OPERATOR)
    effect = "at once" if at_once else f"within {drains.LOOK_EVERY_S:g} s (Redis did not answer)"
    state = "gets no new requests" if drained else "gets requests"
    console.show_facts({"backend": said.backend, "state": state, "everywhere": effect}, as_json=said.json)
