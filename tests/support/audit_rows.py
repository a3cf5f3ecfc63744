"""Audit rows for tests, written as the gateway writes them, and a database to write them to."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import asyncpg

from gateway.audit import table
from gateway.core import strict_json
from gateway.stores.postgres import Database

Result = TypeVar("Result")
DAY = timedelta(days=1)
PLAIN = {
    "request_id": "a-request",
    "key_id": "",
    "client": "192.0.2.7",
    "agent": "curl/8",
    "dialect": "openai",
    "method": "POST",
    "route": "/v1/chat/completions",
    "model": "llama3.2:latest",
    "answered_as": "llama3.2:latest",
    "backend": "alpha",
    "attempts": [],
    "status": 200,
    "outcome": "answered",
    "detail": "",
    "stream": True,
    "prompt_tokens": 3,
    "completion_tokens": 4,
    "tokens_from": "reported",
    "bytes_in": 100,
    "bytes_out": 200,
    "queue_ms": 0.25,
    "ttfb_ms": 12.5,
    "total_ms": 99.125,
}


def micros(at: datetime) -> int:
    return int(at.timestamp() * 1_000_000)


def ago(days: float) -> datetime:
    return datetime.now(UTC) - days * DAY


def row(at: datetime, **changes: Any) -> dict[str, Any]:
    return {**PLAIN, "id": str(uuid.uuid4()), "at": micros(at), **changes}


def billed(row: dict[str, Any]) -> int:
    """The tokens that a row is billed for."""
    billed_tokens = row["billed_tokens"]
    return int(row["prompt_tokens"] + row["completion_tokens"] if billed_tokens is None else billed_tokens)


def packed(rows: list[dict[str, Any]]) -> list[bytes]:
    return [strict_json.write(row) for row in rows]


def prompt(at: datetime, key_id: str) -> dict[str, Any]:
    return {"id": str(uuid.uuid4()), "at": micros(at), "key_id": key_id, "request": "{}", "answer": "words", "is_cut": False}


def in_database(url: str, work: Callable[[Database], Awaitable[Result]]) -> Result:
    async def run() -> Result:
        async with Database(url) as database:
            return await work(database)

    return asyncio.run(run())


def write(url: str, *batches: list[dict[str, Any]]) -> None:
    async def run(database: Database) -> None:
        for batch in batches:
            assert await table.write(database, packed(batch)) == len(batch)

    in_database(url, run)


def write_prompts(url: str, prompts: list[dict[str, Any]], keep: timedelta) -> None:
    in_database(url, lambda database: table.write(database, [], prompts, keep))


def sql(url: str, *statements: str) -> list[Any]:
    """Runs the statements one after the other, without the gateway; returns the first column of the last one's rows."""

    async def run() -> list[Any]:
        connection = await asyncpg.connect(url)
        try:
            return [[found[0] for found in await connection.fetch(statement)] for statement in statements][-1]
        finally:
            await connection.close()

    return asyncio.run(run())


def add_key(url: str, key_id: str, name: str = "", *, more: str = "") -> None:
    """A key with a secret of the same id; `more` assigns other columns."""
    sql(url, f"INSERT INTO keys (id, name) VALUES ('{key_id}', '{name or key_id}')")
    sql(url, f"INSERT INTO secrets (id, key_id, hash) VALUES ('{key_id}', '{key_id}', '')")
    if more:
        sql(url, f"UPDATE keys SET {more} WHERE id = '{key_id}'")
