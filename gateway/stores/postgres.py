"""PostgreSQL: the named queries of `sql/queries`, run on a pool of connections."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import asyncpg

from gateway.core.errors import ReadOnly, StoreRefused, StoreUnavailable, TooSlow

SQL = Path(__file__).resolve().parents[2] / "sql"
NAMED_QUERY = re.compile(r"^-- name: (\w+)\n-- [^\n]+\n(.*?);\s*$", re.MULTILINE | re.DOTALL)
PAUSE_AFTER_FAILURE_S = 1.0
IDLE_CONNECTION_S = 300.0
ROWS_PER_FETCH = 500
LOG = logging.getLogger("gateway.database")

# The server or the connection to it has failed.
UNAVAILABLE = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
# The server answers, but its state, schema or rights do not allow the query. This is never the caller's fault.
REFUSED = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InvalidTransactionStateError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.SyntaxOrAccessError,
)
LOG_REFUSALS_EVERY_S = 60.0
Connection = asyncpg.pool.PoolConnectionProxy
Row = asyncpg.Record


class DuplicateRow(Exception):
    """A row with the same unique value exists."""


def read_queries(folder: Path = SQL / "queries") -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.sql")):
        for name, sql in NAMED_QUERY.findall(path.read_text(encoding="utf-8")):
            if name in found:
                raise ValueError(f"two queries are named {name}")
            found[name] = sql
    return found


class Database:
    """Named queries on a pool of connections. Every wait has a deadline; a failed server raises StoreUnavailable.

    Connections are opened when needed, at most `size + overflow`. After the server has failed, calls fail at once for a
    second, so that callers do not wait one after the other for a frozen server.
    """

    def __init__(self, url: str, *, size: int = 2, overflow: int = 0, timeout_s: float = 3.0) -> None:
        self._url, self._limit, self._timeout_s = url, size + overflow, timeout_s
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._queries = read_queries()
        self._down_until = 0.0
        self.up = True
        self.was_reached = False
        # A standby, or a server configured to be read-only, answers but takes no writes.
        self.takes_writes = True
        self._refusal_logged_at = -LOG_REFUSALS_EVERY_S
        self.calls = self.errors = 0

    def _is_down_after(self, error: BaseException) -> bool:
        """Whether the server counts as down after this error; a query that times out means that the server is frozen."""
        return True

    async def __aenter__(self) -> Self:
        self._pool = await asyncpg.create_pool(
            self._url,
            connect=_connect_to_writable if _may_choose(self._url) else None,
            min_size=0,
            max_size=self._limit,
            timeout=self._timeout_s,
            command_timeout=self._timeout_s,
            max_inactive_connection_lifetime=IDLE_CONNECTION_S,
            server_settings={"application_name": "neuronetz-gateway"},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._pool is not None
        try:
            await asyncio.wait_for(self._pool.close(), self._timeout_s)
        except (TimeoutError, asyncpg.InterfaceError):
            self._pool.terminate()

    def sql(self, query: str) -> str:
        """The text of a named query, for callers that hold a connection."""
        return self._queries[query]

    async def rows(self, query: str, *values: object) -> list[asyncpg.Record]:
        async with self.connection() as connection:
            return await connection.fetch(self._queries[query], *values)

    async def row(self, query: str, *values: object) -> asyncpg.Record | None:
        async with self.connection() as connection:
            return await connection.fetchrow(self._queries[query], *values)

    async def value(self, query: str, *values: object) -> Any:
        async with self.connection() as connection:
            return await connection.fetchval(self._queries[query], *values)

    async def stream(self, query: str, *values: object, timeout_s: float) -> AsyncGenerator[asyncpg.Record, None]:
        """Any number of rows, with ROWS_PER_FETCH of them in memory; `timeout_s` is the deadline of each fetch."""
        async with self.connection() as connection, connection.transaction(readonly=True):
            async for row in connection.cursor(self._queries[query], *values, prefetch=ROWS_PER_FETCH, timeout=timeout_s):
                yield row

    async def run(self, query: str, *values: object) -> None:
        await self.run_all([(query, values)])

    async def run_all(self, steps: Sequence[tuple[str, Sequence[object]]]) -> None:
        """All queries in one transaction."""
        async with self.writing() as connection:
            for query, values in steps:
                await connection.execute(self._queries[query], *values)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """One transaction that writes."""
        async with self.connection() as connection:
            async with connection.transaction():
                yield connection
            self._note_writes(taken=True)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        if time.monotonic() < self._down_until:
            raise StoreUnavailable
        assert self._pool is not None
        self.calls += 1
        connection = await self._acquire(self._pool)
        try:
            yield connection
        except asyncpg.UniqueViolationError as error:
            raise DuplicateRow from error
        except UNAVAILABLE as error:
            raise (self._mark_down(error) if self._is_down_after(error) else TooSlow()) from error
        except REFUSED as error:
            raise await self._refusal(error) from error
        finally:
            with suppress(*UNAVAILABLE):
                await self._pool.release(connection)
        self.was_reached = True
        self._note_up(up=True)

    async def _acquire(self, pool: "asyncpg.Pool[asyncpg.Record]") -> Connection:
        try:
            return await pool.acquire(timeout=self._timeout_s)
        except (asyncpg.PostgresError, *UNAVAILABLE) as error:
            # Whatever refuses a connection (no such database, wrong password, starting up), no query can be run.
            raise (self._mark_down(error) if self._is_down_after(error) else TooSlow()) from error

    def _mark_down(self, error: BaseException) -> StoreUnavailable:
        self._down_until = time.monotonic() + PAUSE_AFTER_FAILURE_S
        self.errors += 1
        self._note_up(up=False, reason=type(error).__name__)
        return StoreUnavailable()

    async def _refusal(self, error: asyncpg.PostgresError) -> StoreUnavailable:
        self.errors += 1
        if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            await self._reconnect_to_primary()
            return ReadOnly()
        refused = StoreRefused(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        if time.monotonic() - self._refusal_logged_at > LOG_REFUSALS_EVERY_S:
            self._refusal_logged_at = time.monotonic()
            LOG.error("PostgreSQL refuses: %s", refused.reason)
        return refused

    async def _reconnect_to_primary(self) -> None:
        """A session keeps its server, but the same address may lead to a new primary by now."""
        self._note_writes(taken=False)
        assert self._pool is not None
        await self._pool.expire_connections()

    def _note_writes(self, *, taken: bool) -> None:
        if self.takes_writes != taken:
            self.takes_writes = taken
            state = "takes writes again" if taken else "takes no writes: it is a standby, or configured to be read-only"
            LOG.log(logging.INFO if taken else logging.ERROR, "PostgreSQL %s", state)

    def _note_up(self, *, up: bool, reason: str = "") -> None:
        if self.up != up:
            self.up = up
            LOG.log(
                logging.INFO if up else logging.ERROR, "PostgreSQL %s", "answers again" if up else f"is unreachable: {reason}"
            )

    async def schema_version(self) -> int:
        """The newest migration applied, 0 if there is none; notes whether the server takes writes. Raises StoreUnavailable."""
        async with self.connection() as connection:
            try:
                row = await connection.fetchrow(self._queries["schema_state"])
            except asyncpg.UndefinedTableError:
                return 0
        assert row is not None
        if row["is_read_only"]:
            await self._reconnect_to_primary()
        else:
            self._note_writes(taken=True)
        return int(row["version"] or 0)


class ReportDatabase(Database):
    """A pool for queries over many rows: one that is too slow does not mean that the server is down."""

    def _is_down_after(self, error: BaseException) -> bool:
        return not isinstance(error, TimeoutError)


def advice_for(error: StoreUnavailable) -> str:
    """For operators: what is wrong with PostgreSQL, and what to do."""
    if isinstance(error, ReadOnly):
        return "PostgreSQL takes no writes: name the primary in DATABASE_URL, or all servers of it"
    if isinstance(error, StoreRefused):
        return f"PostgreSQL refuses: {error.reason}: `make doctor` checks the schema and the rights"
    if isinstance(error, TooSlow):
        return "PostgreSQL takes too long for this: ask for a shorter period or for less"
    return "PostgreSQL does not answer: check DATABASE_URL and that the server runs"


def _may_choose(url: str) -> bool:
    """Whether the URL names several servers and leaves open which kind is wanted."""
    return "," in url and "target_session_attrs" not in url


async def _connect_to_writable(*arguments: Any, **options: Any) -> Any:
    """Connects to the first server that takes writes; if none does, to any, as keys can still be read from it."""
    connect: Any = asyncpg.connect
    with suppress(asyncpg.TargetServerAttributeNotMatched, OSError):
        return await connect(*arguments, target_session_attrs="read-write", **options)
    return await connect(*arguments, **options)
