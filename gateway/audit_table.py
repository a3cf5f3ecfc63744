"""The audit's table: rows are added in batches, each batch a link of the chain of digests; twice is once."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway import strict_json
from gateway.database import Connection, Database

COLUMNS = (
    "id at batch request_id key_id client agent dialect method route model answered_as backend attempts status outcome detail "
    "stream prompt_tokens completion_tokens tokens_from bytes_in bytes_out queue_ms ttfb_ms total_ms"
).split()
TEXTS = frozenset("request_id key_id client agent dialect method route model answered_as backend outcome detail".split())
LONGEST_TEXT = 400
EMPTY_CHAIN = bytes(32)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Row = Mapping[str, Any]


def moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)


def text(value: object) -> str:
    """What PostgreSQL takes: no NUL, no half of a surrogate pair, not without end."""
    return str(value)[:LONGEST_TEXT].encode("utf-8", "replace").decode().replace("\x00", "\ufffd")


def _record(row: Row, batch: int) -> tuple[Any, ...]:
    """`row` has the columns' names, without `batch`; `at` in microseconds since the epoch, `attempts` a list."""
    values: dict[str, Any] = {name: text(value) if name in TEXTS else value for name, value in row.items()}
    values |= {"id": uuid.UUID(row["id"]), "at": moment(row["at"]), "batch": batch}
    values["attempts"] = strict_json.write(row["attempts"]).decode().replace("\\u0000", "")
    return tuple(values[name] for name in COLUMNS)


async def write(
    database: Database, rows: Sequence[Row], prompts: Sequence[Row] = (), keep_prompts: timedelta = EPOCH - EPOCH
) -> int:
    """All rows that are not there yet, as one batch, and the prompts; returns how many rows were new.

    Raises StoreUnavailable, with nothing written.
    """
    async with database.connection() as connection, connection.transaction():
        await connection.execute(database.sql("lock_audit"))
        fresh = await _not_yet_there(database, connection, rows)
        if fresh:
            await _add_batch(database, connection, fresh)
        if prompts:
            await connection.execute(database.sql("add_prompts"), *_prompt_columns(prompts), keep_prompts)
    return len(fresh)


async def _not_yet_there(database: Database, connection: Connection, rows: Sequence[Row]) -> list[Row]:
    by_id = {uuid.UUID(row["id"]): row for row in reversed(rows)}
    moments = [moment(row["at"]) for row in by_id.values()]
    known = await connection.fetch(database.sql("known_audit_rows"), moments, list(by_id))
    for found in known:
        del by_id[found["id"]]
    return list(by_id.values())


async def _add_batch(database: Database, connection: Connection, rows: Sequence[Row]) -> None:
    moments, ids = [moment(row["at"]) for row in rows], [uuid.UUID(row["id"]) for row in rows]
    for month in {(at.year, at.month): at for at in moments}.values():
        await connection.execute(database.sql("make_audit_partition"), month)
    last = await connection.fetchrow(database.sql("last_audit_batch"))
    batch, previous = (last["id"] + 1, last["digest"]) if last else (1, EMPTY_CHAIN)
    await connection.copy_records_to_table("audit", records=[_record(row, batch) for row in rows], columns=COLUMNS)
    await connection.execute(database.sql("add_audit_batch"), batch, previous, moments, ids)


def _prompt_columns(prompts: Sequence[Row]) -> tuple[list[Any], ...]:
    return (
        [uuid.UUID(prompt["id"]) for prompt in prompts],
        [moment(prompt["at"]) for prompt in prompts],
        [prompt["key_id"] for prompt in prompts],
        *([prompt[name].replace("\x00", "\ufffd") for prompt in prompts] for name in ("request", "answer")),
        [prompt["is_cut"] for prompt in prompts],
    )
