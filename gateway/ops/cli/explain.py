"""`explain`: where a call would be sent now, and why."""

import argparse
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from gateway.admin.explain import Fleet, Question, explain, operation_of
from gateway.auth.key_store import KeyStore
from gateway.components import default_quota, has_equals, hasher_of, routing_of
from gateway.dialects import registry
from gateway.fleet import board, cost_store, presence
from gateway.fleet.backends.backend import Backend
from gateway.fleet.board import Board
from gateway.fleet.claim import Routing
from gateway.fleet.claims import Claims
from gateway.fleet.costs import Costs
from gateway.fleet.eta import EtaCorrection
from gateway.fleet.forecast import forecast
from gateway.fleet.local_slots import LocalSlots
from gateway.fleet.presence import ProcessState
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

# Why a backend is chosen, as in the audit.
BECAUSE = {
    "order": "it is the first in order with a free slot",
    "loaded": "it has the model loaded",
    "home": "the conversation is cached there",
    "load": "it loads the model soonest",
    "join": "it is loading the model already",
    "tier": "it has the model loaded, and those of a higher tier do not",
    "spill": "those of a higher tier would take much longer",
}
UNKNOWN_ORDER = 10**6


async def explain_call(settings: Settings, arguments: argparse.Namespace) -> None:
    operation = operation_of(arguments.client, registry.operations(registry.dialects()))
    async with (
        discovering(settings) as (discovery, store, configs),
        current_database(settings) as database,
        ShardConnections(settings.redis_url, read_scripts(limiter.LUA, board.LUA), lambda _: None) as connections,
    ):
        key_store = KeyStore(database, hasher_of(settings), store)
        key = await key_store.active_key(arguments.key)
        question = Question(key, arguments.model, operation, arguments.prompt, arguments.output)
        states = await _states(store)
        drained = frozenset(row["backend"] for row in await database.rows("drained_backends"))
        routing = _routing(settings, states or ())
        claims = Claims(routing, await _costs(store), b"", has_tiers=has_equals(configs))
        # Alone, a command knows no calls and no loaded models.
        nobody = LocalSlots(routing, lambda slots: slots, lambda *_: False)
        own = Board(connections, "command", routing, lambda _: None, lambda: None)
        foresee = partial(forecast, board=own, local=nobody, eta=EtaCorrection())
        backends, seen = [Backend(config) for config in configs], presence.merged_view(states or ())
        fleet = Fleet(backends, seen, drained, discovery.catalog, claims, foresee)
        limits = Limiter(connections, Budgets(database, store).seed, most_output=settings.max_num_predict)
        found = await explain(question, fleet, limits, default_quota(settings), settings.max_num_predict)
    found["processes"] = None if states is None else len(states)
    if arguments.json:
        console.show_facts(found, as_json=True)
    else:
        _show(found)


async def _states(store: RedisClient) -> list[ProcessState] | None:
    """The running processes; None while Redis is unreachable."""
    try:
        return await presence.read(store)
    except RedisUnavailable:
        return None


async def _costs(store: RedisClient) -> Costs:
    with suppress(RedisUnavailable):
        return await cost_store.read(store)
    return Costs()


def _routing(settings: Settings, states: Sequence[ProcessState]) -> Routing:
    """That of the running gateways, else that of these settings."""
    own = routing_of(settings)
    running = next((state.routing for state in states if state.routing), {})
    return own._replace(**{name: value for name, value in running.items() if name in own._fields})


def _show(found: Mapping[str, Any]) -> None:
    known = "known" if found["model_is_known"] else "NOT KNOWN to any backend"
    allowed = "may use it" if found["key_may_use_it"] else "may NOT use it"
    print(f"{_verdict(found)}\n")
    print(f"{found['route']} for {found['model']} ({found['canonical']}): {known}; the key {found['key']['name']} {allowed}")
    if found["alias_of"]:
        print(f"it is an alias of {', then '.join(found['alias_of'])}")
    if found["routing"]:
        print(_queue(found["routing"]))
    print()
    rows = [_row(row, found) for row in sorted(found["backends"], key=lambda row: row["order"] or UNKNOWN_ORDER)]
    console.show(rows, as_json=False, empty="no backends")
    print()
    limits = [{**line, "left": _left(line)} for line in found["limits"]]
    console.show(limits, as_json=False, empty="no limits")
    print(f"limits are decided by {found['limits_decided_by']}")
    print(f"\nmost tokens of an answer: {found['most_tokens']}")
    print(f"running processes: {'unknown, Redis is unreachable' if found['processes'] is None else found['processes']}")


def _queue(routing: Mapping[str, Any]) -> str:
    if routing["decided_by"] != "Redis":
        return f"ROUTING={routing['mode']}; slots and queue are those of {routing['decided_by']}"
    calls, tokens = routing["waiting"], routing["waiting_tokens"]
    wait = {0: "no call waits", 1: f"1 call ({tokens} tokens) waits"}.get(calls, f"{calls} calls ({tokens} tokens) wait")
    return f"ROUTING={routing['mode']}; {wait} for this model"


def _row(row: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Times in seconds; a backend that is not asked has no estimate."""
    facts: dict[str, Any] = {"try": row["order"], "backend": row["backend"]}
    if found["alias_of"]:
        facts["model"] = row["spelling"]
    if found["routing"]:
        facts |= _terms(row["estimate"] or {})
    return facts | {"why": _why(row)}


def _terms(estimate: Mapping[str, Any]) -> dict[str, Any]:
    slots = f"{estimate['running']}/{estimate['slots']}" if estimate else None
    seconds = {name: _seconds(estimate.get(f"{name}_s")) for name in ("load", "evict", "block", "queue", "prefill")}
    return {
        "tier": estimate.get("tier"),
        "slots": slots,
        "now": estimate.get("can_begin"),
        **seconds,
        "cached": estimate.get("cached_tokens"),
        "total": _seconds(estimate.get("total_s")),
        "penalty": _seconds(estimate.get("penalty_s")),
        "as": estimate.get("why"),
    }


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _why(row: Mapping[str, Any]) -> str:
    return f"{row['why']}; translated to {row['translated_to']}" if row["serves"] and row["translated_to"] else str(row["why"])


def _left(line: Mapping[str, Any]) -> float | None:
    return None if line["used"] is None else round(max(0, line["of"] - line["used"]), 3)


def _verdict(found: Mapping[str, Any]) -> str:
    if found["status"] == 200:
        return _way(found["routing"]) if found["routing"] else f"would go to {found['backend']} now"
    if found["refused_by"]:
        wait_s = found["passes_in_s"]
        passes = "never passes as it is" if wait_s is None else f"passes in about {duration(math.ceil(wait_s) * 1000)}"
        return f"would be refused with 429 {found['outcome']}: {found['refused_by']} is reached; it {passes}"
    if found["routing"]:
        return f"would be refused with 503 {found['outcome']}: {found['routing']['waiting']} calls wait for this model"
    is_gone = not found["model_is_known"] and found["status"] in (403, 404)
    why = ": no backend has this model, `make models` lists all models" if is_gone else ""
    return f"would be refused with {found['status']} {found['outcome']}{why}"


def _way(routing: Mapping[str, Any]) -> str:
    """When it would go, where, and why."""
    because, first_s = BECAUSE[routing["chosen_because"]], routing["first_token_s"]
    first = "" if first_s is None else f"; first token in about {first_s:.1f} s"
    if not routing["position"]:
        return f"would go to {routing['backend']} now: {because}{first}"
    wait_s, place = routing["wait_s"], f"place {routing['position']}"
    if first_s is None:
        return f"would wait, {place}"
    wait = "would wait" if wait_s is None else f"would wait about {wait_s:.1f} s"
    return f"{wait}, {place}, for {routing['backend']}: {because}{first}{'' if wait_s else ' or later'}"
