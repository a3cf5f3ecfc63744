"""PostgreSQL: the pool, the named queries of `sql/queries`, and the migrations of `sql/migrations`."""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import asyncpg

from gateway.core.errors import CommandFailed, ReadOnly, StoreRefused, StoreUnavailable, TooSlow

SQL = Path(__file__).resolve().parents[2] / "sql"
NAMED_QUERY = re.compile(r"^-- name: (\w+)\n-- [^\n]+\n(.*?);\s*$", re.MULTILINE | re.DOTALL)
PAUSE_AFTER_FAILURE_S = 1.0
IDLE_CONNECTION_S = 300.0
STREAMED_AT_ONCE = 500
LOG = logging.getLogger("gateway.database")

DIED = (
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.PostgresSystemError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)
# The server lives and does not do this, now or as it is set up; it is never the fault of who asked.
REFUSED = (
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.TransactionRollbackError,
    asyncpg.ObjectNotInPrerequisiteStateError,
    asyncpg.InvalidTransactionStateError,
    asyncpg.InvalidSQLStatementNameError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.SyntaxOrAccessError,
)
COMPLAIN_EVERY_S = 60.0
Connection = asyncpg.pool.PoolConnectionProxy
Row = asyncpg.Record


class AlreadyThere(Exception):
    """A row that must be the only one of its kind exists."""


class Migration(NamedTuple):
    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def migrations(folder: Path = SQL / "migrations") -> list[Migration]:
    files = sorted(folder.glob("[0-9]*.sql"))
    return [Migration(int(path.name[:4]), path.stem, path.read_text(encoding="utf-8")) for path in files]


def queries(folder: Path = SQL / "queries") -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.sql")):
        for name, sql in NAMED_QUERY.findall(path.read_text(encoding="utf-8")):
            if name in found:
                raise ValueError(f"two queries are named {name}")
            found[name] = sql
    return found


class Database:
    """Named queries on a pool of connections; every wait ends, and what goes wrong is StoreUnavailable.

    Connections are opened when needed, at most `size + overflow`. After a failure that was the database's, calls fail at
    once for a second, so that a frozen server holds nobody up twice.
    """

    def __init__(self, url: str, *, size: int = 2, overflow: int = 0, timeout_s: float = 3.0) -> None:
        self._url, self._limit, self._timeout_s = url, size + overflow, timeout_s
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self._queries = queries()
        self._down_until = 0.0
        self.up = True
        self.was_reached = False
        # A standby, or a server that was told to be read-only, answers and takes nothing.
        self.takes_writes = True
        self._complained_at = -COMPLAIN_EVERY_S
        self.calls = self.errors = 0

    def _is_dead(self, wrong: BaseException) -> bool:
        """Whether a failure means that nothing can be asked for now: an answer that is late, for one, that it is frozen."""
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
        """A named query's text, for those who need a connection of their own."""
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
        """Any number of rows, a few at a time in memory; `timeout_s` is for each few."""
        async with self.connection() as connection, connection.transaction(readonly=True):
            async for row in connection.cursor(self._queries[query], *values, prefetch=STREAMED_AT_ONCE, timeout=timeout_s):
                yield row

    async def run(self, query: str, *values: object) -> None:
        await self.run_all([(query, values)])

    async def run_all(self, steps: Sequence[tuple[str, Sequence[object]]]) -> None:
        """All steps in one transaction."""
        async with self.writing() as connection:
            for query, values in steps:
                await connection.execute(self._queries[query], *values)

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Connection]:
        """One transaction that changes something."""
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
        except asyncpg.UniqueViolationError as wrong:
            raise AlreadyThere from wrong
        except DIED as wrong:
            raise (self._down(wrong) if self._is_dead(wrong) else TooSlow()) from wrong
        except REFUSED as wrong:
            raise await self._refused(wrong) from wrong
        finally:
            with suppress(*DIED):
                await self._pool.release(connection)
        self.was_reached = True
        self._note(up=True)

    async def _acquire(self, pool: "asyncpg.Pool[asyncpg.Record]") -> Connection:
        try:
            return await pool.acquire(timeout=self._timeout_s)
        except (asyncpg.PostgresError, *DIED) as wrong:
            # Whatever a server says to who connects (no such database, wrong password, not now): nothing can be asked.
            raise (self._down(wrong) if self._is_dead(wrong) else TooSlow()) from wrong

    def _down(self, wrong: BaseException) -> StoreUnavailable:
        self._down_until = time.monotonic() + PAUSE_AFTER_FAILURE_S
        self.errors += 1
        self._note(up=False, reason=type(wrong).__name__)
        return StoreUnavailable()

    async def _refused(self, wrong: asyncpg.PostgresError) -> StoreUnavailable:
        self.errors += 1
        if isinstance(wrong, asyncpg.ReadOnlySQLTransactionError):
            await self._look_for_another()
            return ReadOnly()
        refused = StoreRefused(f"{type(wrong).__name__}: {str(wrong).partition(chr(10))[0]}")
        if time.monotonic() - self._complained_at > COMPLAIN_EVERY_S:
            self._complained_at = time.monotonic()
            LOG.error("PostgreSQL refuses: %s", refused.reason)
        return refused

    async def _look_for_another(self) -> None:
        """Behind the same address there may be a primary now, and a session keeps what it began with: connect anew."""
        self._note_writes(taken=False)
        assert self._pool is not None
        await self._pool.expire_connections()

    def _note_writes(self, *, taken: bool) -> None:
        if self.takes_writes != taken:
            self.takes_writes = taken
            told = "takes writes again" if taken else "takes no writes: it is a standby, or told to be read-only"
            LOG.log(logging.INFO if taken else logging.ERROR, "PostgreSQL %s", told)

    def _note(self, *, up: bool, reason: str = "") -> None:
        if self.up != up:
            self.up = up
            LOG.log(logging.INFO if up else logging.ERROR, "PostgreSQL %s", "answers again" if up else f"is away: {reason}")

    async def is_current(self) -> bool:
        """Whether the schema has all that this code needs; sees whether writes are taken, too. Raises StoreUnavailable."""
        async with self.connection() as connection:
            try:
                row = await connection.fetchrow(self._queries["schema_state"])
            except asyncpg.UndefinedTableError:
                return False
        assert row is not None
        if row["is_read_only"]:
            await self._look_for_another()
        else:
            self._note_writes(taken=True)
        # Migrations only add: what a later version has applied is in no way of this one.
        return bool((row["version"] or 0) >= migrations()[-1].version)

    async def migrate(self, say: Callable[[str], None]) -> int:
        """Apply what is missing, all or nothing; returns how many were applied."""
        async with self.writing() as connection:
            await connection.execute(self._queries["lock_migrations"])
            await connection.execute(self._queries["make_migrations_table"])
            applied = {row["version"]: row for row in await connection.fetch(self._queries["applied_migrations"])}
            missing = [migration for migration in migrations() if not _is_applied(migration, applied)]
            for migration in missing:
                say(f"applying {migration.name}")
                await _apply(migration, connection)
                await connection.execute(self._queries["note_migration"], migration.version, migration.name, migration.sha256)
        return len(missing)


class Reports(Database):
    """For sums over many rows: a pool of its own, in which a slow answer says nothing of the server's health."""

    def _is_dead(self, wrong: BaseException) -> bool:
        return not isinstance(wrong, TimeoutError)


def in_words(wrong: StoreUnavailable) -> str:
    """For operators: what is the matter with PostgreSQL, and what to do."""
    if isinstance(wrong, ReadOnly):
        return "PostgreSQL takes no writes: name the primary in DATABASE_URL, or all servers of it"
    if isinstance(wrong, StoreRefused):
        return f"PostgreSQL refuses: {wrong.reason}: `make doctor` looks at the schema and the rights"
    if isinstance(wrong, TooSlow):
        return "PostgreSQL takes too long for this: ask for a shorter time or for less"
    return "PostgreSQL does not answer: check DATABASE_URL and that the server runs"


def _may_choose(url: str) -> bool:
    """Several servers, and no word on which of them is meant."""
    return "," in url and "target_session_attrs" not in url


async def _connect_to_writable(*arguments: Any, **options: Any) -> Any:
    """To the first that takes writes; where none does to any, for keys can still be looked up."""
    connect: Any = asyncpg.connect
    with suppress(asyncpg.TargetServerAttributeNotMatched, OSError):
        return await connect(*arguments, target_session_attrs="read-write", **options)
    return await connect(*arguments, **options)


async def _apply(migration: Migration, connection: Connection) -> None:
    try:
        await connection.execute(migration.sql, timeout=600)
    except DIED:
        raise
    except asyncpg.PostgresError as wrong:
        raise CommandFailed(f"migration {migration.name} failed, nothing was changed: {wrong}") from wrong


def _is_applied(migration: Migration, applied: dict[int, asyncpg.Record]) -> bool:
    row = applied.get(migration.version)
    if row is not None and row["sha256"] != migration.sha256:
        raise CommandFailed(f"migration {row['name']} was applied with another text: restore the file, add a new one instead")
    return row is not None
