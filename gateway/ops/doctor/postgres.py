"""PostgreSQL as the gateway needs it: reachable, current, with enough connections and the audit's next months."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.core.errors import StoreUnavailable
from gateway.ops.doctor.finding import Finding, clock, described, guarded, ok, problem, warning
from gateway.stores import migrations
from gateway.stores.postgres import Database

NAME = "PostgreSQL"
OLDEST_VERSION = 14
ADVICE = "check DATABASE_URL and that the server runs"
ADVICE_RIGHTS = "check that the user of DATABASE_URL owns the tables"


async def examine(url: str, *, most_connections: int, migrates_itself: bool) -> list[Finding]:
    if not url:
        return [problem(NAME, "no DATABASE_URL, and no private server", "set DATABASE_URL, or read why the private one failed")]
    async with Database(url) as database:
        try:
            # The first call opens the connection, which must not count as latency.
            await database.row("server_facts")
            asked_at = time.time()
            facts = dict(await database.row("server_facts") or {})
        except StoreUnavailable as error:
            return [problem(NAME, f"does not answer: {described(error)}", ADVICE)]
        answered_at = time.time()
        found = [
            ok(NAME, f"answers in {(answered_at - asked_at) * 1000:.1f} ms"),
            _version(facts),
            _writes(facts),
            clock(f"{NAME} clock", facts["now"].timestamp() - (asked_at + answered_at) / 2),
            _connections(facts["connections"], most_connections),
        ]
        return found + await _contents(database, facts, migrates_itself=migrates_itself)


def _version(facts: Mapping[str, Any]) -> Finding:
    check, is_new = f"{NAME} version", facts["number"] >= OLDEST_VERSION * 10_000
    advice = f"use PostgreSQL {OLDEST_VERSION} or newer"
    return ok(check, facts["version"]) if is_new else problem(check, facts["version"], advice)


def _writes(facts: Mapping[str, Any]) -> Finding:
    check = f"{NAME} writes"
    if not facts["is_read_only"]:
        return ok(check, "accepted")
    advice = "name the primary in DATABASE_URL, or all servers: host1:5432,host2:5432"
    return problem(check, "refused: it is a standby, or set to read-only", advice)


def _connections(there: int, wanted: int) -> Finding:
    check, found = f"{NAME} connections", f"{there} available, one replica uses up to {wanted}"
    if wanted <= there:
        return ok(check, found)
    return warning(
        check, found, "raise max_connections, or lower DATABASE_POOL_SIZE, DATABASE_POOL_OVERFLOW or GATEWAY_WORKERS"
    )


async def _contents(database: Database, facts: Mapping[str, Any], *, migrates_itself: bool) -> list[Finding]:
    schema = await guarded(f"{NAME} schema", _schema(database, migrates_itself=migrates_itself), ADVICE_RIGHTS)
    if schema[0].state != "ok":
        return schema
    return [
        *schema,
        *await guarded("keys", _keys(database), ADVICE_RIGHTS),
        _rights(facts),
        *await guarded("audit months", _months(database), ADVICE_RIGHTS),
        *await guarded("audit rows", _rows(database), ADVICE_RIGHTS),
    ]


async def _schema(database: Database, *, migrates_itself: bool) -> list[Finding]:
    check = f"{NAME} schema"
    if await migrations.is_current(database):
        return [ok(check, "current")]
    if migrates_itself:
        return [warning(check, "not current", "nothing: `make run` and `make key` migrate the private database")]
    return [problem(check, "not current", "run `make migrate`")]


async def _keys(database: Database) -> list[Finding]:
    count = await database.value("count_living_keys")
    if not count:
        return [warning("keys", "none, so every call is refused", "create one: `make key NAME=…`")]
    return [ok("keys", f"{count} active")]


def _rights(facts: Mapping[str, Any]) -> Finding:
    check = "audit rights"
    if not facts["may_create"]:
        advice = "GRANT CREATE on the schema to the user of DATABASE_URL: each month of the audit is a table"
        return problem(check, "may not create tables", advice)
    if not facts["owns_audit"]:
        advice = "ALTER TABLE audit OWNER to the user of DATABASE_URL: each month of the audit is attached to it"
        return problem(check, "does not own the table audit", advice)
    return ok(check, "may create the audit's months")


async def _months(database: Database) -> list[Finding]:
    now = datetime.now(UTC)
    next_month = now.replace(day=1) + timedelta(days=32)
    there = {row["name"] for row in await database.rows("audit_months")}
    missing = [f"{month:%Y-%m}" for month in (now, next_month) if f"audit_{month:%Y_%m}" not in there]
    if not missing:
        return [ok("audit months", "this one and the next exist")]
    advice = "`make purge` creates them now, a running gateway within an hour"
    return [warning("audit months", f"missing: {', '.join(missing)}", advice)]


async def _rows(database: Database) -> list[Finding]:
    count = await database.value("count_audit_rows_roughly")
    return [ok("audit rows", f"about {count}")]
