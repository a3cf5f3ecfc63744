"""The migration that adds cached tokens: old rows keep their hashes, and old and new versions can write the next ones."""

import asyncio
import threading

import asyncpg
import pytest

from gateway.stores.migrations import read_migrations
from tests.support.audit_rows import ago, row, sql, write
from tests.support.migrated_audit import OLD_HASHES, migrate, migrate_to, verdict
from tests.support.processes import until

LAST_BEFORE = 6
COUNTS = [{}, {"cached_tokens": 0}, {"cached_tokens": 3, "billed_tokens": 5}, {"billed_tokens": 5}, {"cached_tokens": 5}]


@pytest.fixture
def url(empty_database: str) -> str:
    """A database of the version before the migration, with two batches of rows."""
    migrate_to(LAST_BEFORE, empty_database)
    write(empty_database, *([row(ago(days)) for days in (0, 1, 40)] for _ in range(2)))
    return empty_database


def test_old_rows_still_verify_and_new_rows_continue_the_chain(url: str) -> None:
    hashes = sql(url, OLD_HASHES)
    migrate(url)
    assert sql(url, OLD_HASHES) == hashes and verdict(url) == (0, 2, 6)
    write(url, [row(ago(0), **counts) for counts in COUNTS], [row(ago(0))])
    assert verdict(url) == (0, 4, 12)


def test_each_new_column_changes_the_hash(url: str) -> None:
    migrate(url)
    same = row(ago(0))
    seen = set()
    for counts in COUNTS:
        write(url, [{**same, **counts}])
        seen.update(sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3"))
        sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    assert len(seen) == len(COUNTS)


def test_new_partitions_index_rows_billed_for_fewer_tokens(url: str) -> None:
    migrate(url)
    write(url, [row(ago(-40))])
    indexed = "SELECT tablename FROM pg_indexes WHERE indexname LIKE '%_billed' AND indexdef LIKE '%billed_tokens IS NOT NULL%'"
    assert set(sql(url, indexed)) == {f"audit_{ago(days):%Y_%m}" for days in (0, -40)}


def test_the_migration_waits_for_readers_of_the_audit(url: str) -> None:
    waiters = "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
    reading, waiting = threading.Event(), threading.Event()

    async def read() -> None:
        connection = await asyncpg.connect(url)
        async with connection.transaction():
            await connection.fetchval("SELECT count(*) FROM audit")
            reading.set()
            await asyncio.to_thread(waiting.wait, 20)
        await connection.close()

    reader = threading.Thread(target=lambda: asyncio.run(read()))
    reader.start()
    assert reading.wait(10)
    migrator = threading.Thread(target=lambda: migrate(url))
    migrator.start()
    until(lambda: sql(url, waiters) != [0])
    waiting.set()
    migrator.join(30)
    reader.join()
    assert sql(url, "SELECT max(version) FROM schema_migrations") == [len(read_migrations())]
    assert verdict(url) == (0, 2, 6)
