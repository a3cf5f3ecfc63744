"""The table `audit`: rows are added in batches, each a link of the hash chain; a row that is there already is skipped."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from gateway.stores.postgres import Database

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Prompt = Mapping[str, Any]


def moment(microseconds: int) -> datetime:
    return EPOCH + timedelta(microseconds=microseconds)


async def write(
    database: Database, rows: Sequence[bytes], prompts: Sequence[Prompt] = (), keep_prompts: timedelta = EPOCH - EPOCH
) -> int:
    """Adds the rows that are not there yet, as one batch, and the prompts; returns how many rows were new.

    A row is a JSON object by column names, without `batch`, and with `at` in microseconds since the epoch. Writes nothing if
    it raises StoreUnavailable.
    """
    fresh = 0
    async with database.writing() as connection:
        if rows:
            fresh = await connection.fetchval(database.sql("add_audit_rows"), _list_of(rows))
        if prompts:
            await connection.execute(database.sql("add_prompts"), *_prompt_columns(prompts), keep_prompts)
    return fresh


def _list_of(rows: Sequence[bytes]) -> str:
    # A text in PostgreSQL cannot hold NUL, escaped or not.
    return (b"[" + b",".join(rows) + b"]").replace(b"\\u0000", b"\\ufffd").decode("utf-8", "replace")


def _prompt_columns(prompts: Sequence[Prompt]) -> tuple[list[Any], ...]:
    return (
        [uuid.UUID(prompt["id"]) for prompt in prompts],
        [moment(prompt["at"]) for prompt in prompts],
        [prompt["key_id"] for prompt in prompts],
        *([prompt[name].replace("\x00", "\ufffd") for prompt in prompts] for name in ("request", "answer")),
        [prompt["is_cut"] for prompt in prompts],
    )
