"""Redis as the gateway needs it: fast, writable, without eviction, persistent, its audit rows collected in time."""

import asyncio
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from gateway.ops.doctor.finding import Finding, State, clock, described, guarded, ok, problem, warning
from gateway.stores import redis_client, redis_keys

NAME = "Redis"
OLDEST_VERSION = (6, 2)
CALL_S = 2.0
LONGEST_BACKLOG = 10_000
MARK, MARK_MS = redis_keys.DOCTOR_CHECK, 1000
ADVICE = "check REDIS_URL and that the server runs"
ADVICE_RIGHTS = "check that the user of REDIS_URL may use this command"


async def examine(url: str, *, is_needed: bool) -> list[Finding]:
    """If it is not needed (one process, no REDIS_URL), its absence is only a warning."""
    client = redis_client.connect(url, deadline_s=CALL_S)
    try:
        try:
            await client.ping()
        except Exception as error:  # noqa: BLE001 # whatever the reason, it cannot be used
            state: State = "problem" if is_needed else "warning"
            return [Finding(NAME, state, f"does not answer: {described(error)}", ADVICE)]
        return await _findings(client)
    finally:
        with suppress(Exception):
            await client.aclose()


async def _findings(client: Any) -> list[Finding]:
    speed = await guarded(NAME, _speed(client), ADVICE)
    how_to_accept = "make it accept writes: free memory and disk space, the user's rights, not a read-only replica"
    others = await asyncio.gather(
        guarded(f"{NAME} clock", _clock(client), ADVICE_RIGHTS),
        guarded(f"{NAME} writes", _writes(client), how_to_accept),
        guarded(f"{NAME} facts", _facts(client), ADVICE_RIGHTS),
        guarded("audit backlog", _backlog(client), ADVICE_RIGHTS),
        guarded("audit losses", _losses(client), ADVICE_RIGHTS),
    )
    return [found for group in (speed, *others) for found in group]


async def _speed(client: Any) -> list[Finding]:
    """The best of three: the gateway skips Redis when a call takes longer than its deadline."""
    times = []
    for _ in range(3):
        began = time.monotonic()
        await client.ping()
        times.append(time.monotonic() - began)
    found = f"answers in {min(times) * 1000:.1f} ms"
    advice = f"move it closer: a gateway waits {redis_client.CALL_DEADLINE_S * 1000:g} ms and then continues without it"
    if min(times) > redis_client.CALL_DEADLINE_S:
        return [problem(NAME, found, advice)]
    return [warning(NAME, found, advice) if min(times) > redis_client.CALL_DEADLINE_S / 2 else ok(NAME, found)]


async def _clock(client: Any) -> list[Finding]:
    asked_at = time.time()
    seconds, microseconds = await client.time()
    return [clock(f"{NAME} clock", seconds + microseconds / 1e6 - (asked_at + time.time()) / 2)]


async def _writes(client: Any) -> list[Finding]:
    await client.set(MARK, "", px=MARK_MS)
    await client.publish(redis_keys.SLOT_FREED, b"")
    return [ok(f"{NAME} writes", "accepted")]


async def _facts(client: Any) -> list[Finding]:
    """INFO has the policy also where managed services forbid CONFIG."""
    info = await client.info()
    return [version(info), eviction(info), persistence(info)]


def version(info: Mapping[str, Any]) -> Finding:
    check, text = f"{NAME} version", str(info.get("redis_version", "unknown"))
    number = tuple(map(int, re.findall(r"\d+", text)[:2]))
    found = f"{text} (Valkey {info['valkey_version']})" if "valkey_version" in info else text
    oldest = ".".join(map(str, OLDEST_VERSION))
    if number < OLDEST_VERSION:
        return problem(check, found, f"use Redis {oldest} or newer, or Valkey")
    return ok(check, found)


def eviction(info: Mapping[str, Any]) -> Finding:
    check, policy = f"{NAME} eviction", str(info.get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return ok(check, policy)
    return warning(check, policy, "set maxmemory-policy to noeviction: limits and audit rows must not be evicted")


def persistence(info: Mapping[str, Any]) -> Finding:
    check = f"{NAME} persistence"
    if info.get("aof_enabled"):
        return ok(check, "append-only file")
    return warning(
        check, "no append-only file", "set appendonly to yes: otherwise a restart loses counts and unwritten audit rows"
    )


async def _backlog(client: Any) -> list[Finding]:
    count = sum([await client.xlen(shared.rows) for shared in redis_keys.BY_SHARD])
    found = f"{count} rows wait for PostgreSQL"
    if count > LONGEST_BACKLOG:
        return [
            warning(
                "audit backlog", found, "check that a gateway runs and PostgreSQL answers: the gateway writes the rows to it"
            )
        ]
    return [ok("audit backlog", found)]


async def _losses(client: Any) -> list[Finding]:
    counts = {shared.dropped.decode(): int(await client.get(shared.dropped) or 0) for shared in redis_keys.BY_SHARD}
    count = sum(counts.values())
    if count:
        names = " ".join(name for name, lost in counts.items() if lost)
        advice = f"read the gateway's log for the reason, then reset the count: `redis-cli DEL {names}`"
        return [warning("audit losses", f"{count} rows were dropped", advice)]
    return [ok("audit losses", "none")]
