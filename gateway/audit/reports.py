"""Reports on the audit: requests by filter, the trace of one request, and usage sums."""

import re
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from gateway.auth import key_format
from gateway.core import strict_json
from gateway.core.errors import NotFound
from gateway.dialects.model_names import canonical
from gateway.stores.postgres import Database, Row

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
GROUP_COLUMNS = ("day", "key_id", "key", "model", "answered_as", "backend")


class ModelFilter(NamedTuple):
    """PostgreSQL patterns: `canonical` for LIKE on canonical names, `spelled` for ILIKE on their spellings (a superset)."""

    canonical: list[str]
    spelled: list[str]


@dataclass(frozen=True)
class AuditFilter:
    """Which requests to list; None selects all. `status` is the first and the last of a range."""

    key_id: str | None = None
    models: ModelFilter | None = None
    since: datetime | None = None
    status: tuple[int, int] | None = None
    outcome: str | None = None
    limit: int | None = None

    def parameters(self) -> tuple[object, ...]:
        """Of the query `list_audit`."""
        names, spelled = self.models or (None, None)
        return (self.key_id, names, self.since, *(self.status or (None, None)), self.outcome or None, self.limit, spelled)


def model_filter(name_or_glob: str) -> ModelFilter:
    """A glob without a tag matches every tag."""
    plain = name_or_glob.strip().lower()
    if not set(plain) & {"*", "?"}:
        plain = canonical(plain).canonical
    pattern = _like(plain)
    names = [pattern] if ":" in pattern else [pattern, f"{pattern}:latest"]
    return ModelFilter(names, [f"%{_like(_in_every_spelling(plain))}%"])


def _like(glob: str) -> str:
    return re.sub(r"([\\%_])", r"\\\1", glob).replace("*", "%").replace("?", "_")


def _in_every_spelling(glob: str) -> str:
    """The part of a glob that a request's own spelling contains, which may lack the tag `latest`."""
    name, colon, tag = glob.rpartition(":")
    if not colon:
        return re.split(r"[*?]", glob)[0]
    return name if tag == "latest" or set(tag) & {"*", "?"} else glob


async def key_named(database: Database, id_or_name: str) -> Row:
    """The `id` and `name` of a key, also of a revoked one. Raises NotFound."""
    row = await database.row("find_any_key", id_or_name) if id_or_name.isprintable() else None
    if row is None:
        raise NotFound(f"there is no key {key_format.redacted(id_or_name)[:64]!r}: see `make keys`")
    return row


async def requests(database: Database, wanted: AuditFilter) -> list[dict[str, Any]]:
    """The newest first."""
    return [audit_row(row) for row in await database.rows("list_audit", *wanted.parameters())]


async def stream_requests(database: Database, wanted: AuditFilter, *, timeout_s: float) -> AsyncGenerator[dict[str, Any], None]:
    """As `requests`, for any number of rows."""
    async with aclosing(database.stream("list_audit", *wanted.parameters(), timeout_s=timeout_s)) as rows:
        async for row in rows:
            yield audit_row(row)


async def trace(database: Database, request_id: str, since: datetime, limit: int) -> list[dict[str, Any]]:
    """The rows of one request, by its id or by the caller's, which may not be unique. Raises NotFound."""
    own_id = uuid_of(request_id)
    rows = await database.rows("trace_request", own_id, request_id, since, limit) if request_id.isprintable() else []
    if not rows:
        shown = key_format.redacted(request_id)[:64]
        raise NotFound(
            f"no request {shown!r} in the audit: the audit has only requests made with a valid key, "
            "for as long as that key's retention lasts"
        )
    return [audit_row(row) for row in rows]


def uuid_of(request_id: str) -> uuid.UUID | None:
    """None for an id that only a caller can have given."""
    try:
        return uuid.UUID(request_id)
    except ValueError:
        return None


def audit_row(row: Row) -> dict[str, Any]:
    return {**row, "attempts": strict_json.read_loosely(row["attempts"])}


async def usage(
    database: Database, by: Sequence[str], since: datetime, *, timeout_s: float | None = None
) -> list[dict[str, Any]]:
    """Sums by any of key, model, answered_as, backend and day, with only the columns of these."""
    async with database.connection() as connection:
        rows = await connection.fetch(database.sql("sum_audit"), by, since, timeout=timeout_s)
    left_out = {*GROUP_COLUMNS} - {*by, *(("key_id",) if "key" in by else ())}
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]
