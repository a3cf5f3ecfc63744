"""What has expired is deleted, for each key and month, and the hash chain stays whole."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway.audit import hash_chain, retention, table
from gateway.audit.retention import Removed
from gateway.core.errors import StoreUnavailable
from gateway.stores.postgres import Database, advice_for
from tests.conftest import TestStores
from tests.support.audit_rows import DAY, add_key, ago, in_database, packed, prompt, row, sql, write, write_prompts
from tests.support.processes import until

KEEP = 365 * DAY
MONTHS = "SELECT relname::text FROM pg_class WHERE relname ~ '^audit_\\d{4}_\\d{2}$' ORDER BY 1"
KEYS = "SELECT DISTINCT key_id FROM audit ORDER BY 1"


@pytest.fixture
def url(stores: TestStores) -> str:
    return stores.database_url


def apply(url: str, keep: timedelta = KEEP) -> Removed:
    return in_database(url, lambda database: retention.apply(database, keep))


def whole(url: str) -> tuple[int, int, int]:
    """Batches, rows and purged rows; fails unless the chain is whole."""
    found = in_database(url, lambda database: hash_chain.verify(database, lambda _: None))
    assert found.findings == []
    return found.batches, found.rows, found.purged


def month_of(at: datetime) -> str:
    return f"audit_{at:%Y_%m}"


def months_ahead() -> list[str]:
    now = datetime.now(UTC)
    months = [now.year * 12 + now.month - 1 + more for more in range(3)]
    return [f"audit_{month // 12}_{month % 12 + 1:02}" for month in months]


def start_of_month(months_back: int) -> datetime:
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    for _ in range(months_back):
        month = (month - DAY).replace(day=1)
    return month


def test_nothing_is_deleted_before_it_expires(url: str) -> None:
    write(url, [row(ago(1)), row(ago(364))])
    assert not apply(url)
    assert whole(url) == (1, 2, 0)


def test_partitions_for_the_next_months_are_created(url: str) -> None:
    assert apply(url) == Removed()
    assert sql(url, MONTHS) == months_ahead()
    apply(url)
    assert sql(url, MONTHS) == months_ahead()


def test_expired_rows_are_deleted_and_their_hashes_kept(url: str) -> None:
    kept, expired = row(ago(10)), row(ago(12))
    write(url, [kept, expired], [row(ago(12)), row(ago(10))])
    assert apply(url, 11 * DAY).rows == 2
    assert len(sql(url, "SELECT id FROM audit")) == 2
    assert [str(id_) for id_ in sql(url, "SELECT id FROM audit WHERE batch = 1")] == [kept["id"]]
    assert sql(url, "SELECT length(purged) FROM audit_batches ORDER BY id") == [32, 32]
    assert whole(url) == (2, 2, 2)


def test_each_key_has_its_own_retention(url: str) -> None:
    add_key(url, "short", more="audit_retention = '2 days'")
    add_key(url, "long", more="audit_retention = '900 days'")
    add_key(url, "plain")
    write(url, *([row(ago(days), key_id=key) for key in ("short", "long", "plain", "unknown")] for days in (800, 400, 3, 1)))
    assert apply(url).rows == 5 + 2
    kept = sql(url, "SELECT string_agg(key_id, ' ' ORDER BY key_id) FROM audit GROUP BY batch ORDER BY batch")
    assert kept == ["long", "long", "long plain unknown", "long plain short unknown"]
    assert whole(url) == (4, 9, 7)
    assert not apply(url)


def test_a_month_is_dropped_when_all_its_rows_have_expired(url: str) -> None:
    write(url, *([row(ago(days)) for _ in range(3)] for days in (500, 500, 400, 1)))
    removed = apply(url)
    assert removed.rows == 9
    assert removed.partitions == sorted({month_of(ago(500)), month_of(ago(400))})
    assert sql(url, MONTHS) == sorted({month_of(ago(1)), *months_ahead()})
    assert sql(url, "SELECT batch FROM audit_anchor") == [3]
    assert sql(url, "SELECT id FROM audit_batches") == [4]
    assert whole(url) == (1, 3, 0)


def test_a_batch_that_spans_two_months_keeps_the_hashes_of_the_dropped_month(url: str) -> None:
    border = start_of_month(14)
    before, after = border - timedelta(hours=1), border + timedelta(hours=1)
    write(url, [row(before)], [row(before), row(after), row(before)], [row(after)], [row(before), row(after)])
    age = datetime.now(UTC) - border
    removed = apply(url, age)
    assert (removed.rows, removed.partitions) == (4, [month_of(before)])
    assert sql(url, "SELECT batch FROM audit_anchor") == [1]
    assert sql(url, "SELECT length(purged) FROM audit_batches ORDER BY id") == [64, 0, 32]
    assert whole(url) == (3, 3, 3)


def test_a_month_is_dropped_while_an_older_one_stays(url: str) -> None:
    add_key(url, "long", more="audit_retention = '9000 days'")
    write(url, [row(ago(800), key_id="long")], [row(ago(500)), row(ago(500))], [row(ago(1))])
    removed = apply(url)
    assert (removed.rows, removed.partitions) == (2, [month_of(ago(500))])
    assert sql(url, "SELECT gone FROM audit_batches ORDER BY id") == [False, True, False]
    assert sql(url, "SELECT batch FROM audit_anchor") == []
    assert whole(url) == (3, 2, 2)
    sql(url, "UPDATE keys SET audit_retention = NULL")
    assert apply(url).partitions == [month_of(ago(800))]
    assert sql(url, "SELECT batch FROM audit_anchor") == [2]
    assert whole(url) == (1, 1, 0)


def test_the_beginning_of_the_chain_is_trimmed_without_dropping_a_month(url: str) -> None:
    now = datetime.now(UTC)
    write(url, [row(now - 3 * DAY)], [row(now - 2 * DAY)], [row(now)], [row(now - 3 * DAY)], [row(now)])
    assert apply(url, DAY).rows == 3
    assert sql(url, "SELECT batch FROM audit_anchor") == [2]
    assert sql(url, "SELECT id FROM audit_batches WHERE gone") == [4]
    assert whole(url) == (3, 2, 1)


def test_the_chain_continues_after_all_rows_were_purged(url: str) -> None:
    write(url, [row(ago(400))], [row(ago(400))])
    digests = sql(url, "SELECT digest FROM audit_batches WHERE id = 2")
    assert apply(url).rows == 2
    assert sql(url, "SELECT id FROM audit_batches") == []
    assert sql(url, "SELECT digest FROM audit_anchor") == digests
    write(url, [row(ago(0))])
    assert sql(url, "SELECT id FROM audit_batches") == [3]
    assert sql(url, "SELECT previous FROM audit_batches") == digests
    assert whole(url) == (1, 1, 0)


def test_a_late_row_of_a_dropped_month_is_dropped_too(url: str) -> None:
    write(url, [row(ago(400))])
    assert apply(url).partitions
    write(url, [row(ago(400)), row(ago(1))])
    removed = apply(url)
    assert (removed.rows, removed.partitions) == (1, [month_of(ago(400))])
    assert whole(url) == (1, 1, 1)


def test_purging_does_not_hide_rows_deleted_by_others(url: str) -> None:
    """Also not when the whole month is dropped."""
    write(url, [row(ago(400))], [row(ago(400)), row(ago(400))], [row(ago(400))], [row(ago(1))])
    sql(url, "DELETE FROM audit WHERE id = (SELECT id FROM audit WHERE batch = 2 LIMIT 1)")
    removed = apply(url)
    assert (removed.rows, removed.partitions) == (3, [month_of(ago(400))])
    found = in_database(url, lambda database: hash_chain.verify(database, lambda _: None))
    assert [(each.batch, each.found) for each in found.findings] == [(2, "missing rows: 1")]


def test_many_rows_are_deleted_in_small_steps(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class RecordingSteps(retention.Steps):
        async def value(self, query: str, *values: object) -> object:
            found = await super().value(query, *values)
            if query == "purge_audit_rows":
                assert isinstance(found, int)
                sizes.append(found)
            return found

    monkeypatch.setattr(retention, "Steps", RecordingSteps)
    monkeypatch.setattr(retention, "KEYS_AT_ONCE", 2)
    keys = ["a", "b", "c", "d", "e"]
    add_key(url, "long", more="audit_retention = '9000 days'")
    write(url, *([row(ago(3), key_id=keys[n % 5]) for n in range(900)] for _ in range(4)), [row(ago(3), key_id="long")])
    assert apply(url, 2 * DAY).rows == 3600
    assert sum(sizes) == 3600 and max(sizes) <= retention.MOST_ROWS and len(sizes) > 4
    assert whole(url) == (1, 1, 0)


@asynccontextmanager
async def reading_the_audit(database: Database) -> AsyncIterator[None]:
    async with database.connection() as connection, connection.transaction():
        await connection.fetch("SELECT count(*) FROM audit")
        yield


def test_a_month_that_is_being_read_is_dropped_later(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "DROP_ATTEMPTS", 2)
    write(url, [row(ago(400))], [row(ago(1))])

    async def run(database: Database) -> Removed:
        async with reading_the_audit(database):
            return await retention.apply(database, KEEP)

    removed = in_database(url, run)
    assert (removed.rows, removed.partitions) == (0, [])
    assert whole(url) == (2, 2, 0)
    assert apply(url).partitions == [month_of(ago(400))]


def test_writing_and_new_partitions_do_not_wait_for_readers(url: str) -> None:
    write(url, [row(ago(1))])

    async def run(database: Database) -> int:
        async with reading_the_audit(database):
            return await table.write(database, packed([row(ago(-100))]))

    assert in_database(url, run) == 1


def test_one_process_purges_at_a_time(url: str) -> None:
    write(url, [row(ago(400))])

    async def run(database: Database) -> Removed:
        async with database.connection() as connection:
            await connection.fetchval(database.sql("try_retention"))
            return await retention.apply(database, KEEP)

    removed = in_database(url, run)
    assert removed.is_busy_elsewhere and not removed
    assert apply(url).rows == 1


def test_the_audit_is_written_during_a_purge(url: str) -> None:
    write(url, *([row(ago(3)) for _ in range(500)] for _ in range(4)))

    async def run(database: Database) -> int:
        purging = asyncio.create_task(retention.apply(database, DAY))
        written = 0
        while not purging.done():
            written += await table.write(database, packed([row(ago(0)), row(ago(0))]))
        assert (await purging).rows == 2000
        return written

    written = in_database(url, run)
    assert written > 4
    assert whole(url) == (written // 2, written, 0)


# ── prompts ──


def test_expired_prompts_are_deleted(url: str) -> None:
    add_key(url, "default", more="prompt_log = true")
    add_key(url, "short", more="prompt_log = true, prompt_retention = '1 day'")
    write_prompts(url, [prompt(ago(days), key) for days in (0, 2, 40) for key in ("default", "short")], keep=30 * DAY)
    assert apply(url).prompts == 3
    assert sql(url, "SELECT key_id FROM prompts ORDER BY at") == ["default", "default", "short"]


def test_the_prompts_of_a_key_are_forgotten(url: str) -> None:
    for key in ("alice", "bob"):
        add_key(url, key, more="prompt_log = true")
    write_prompts(url, [prompt(ago(n / 1000), key) for n in range(250) for key in ("alice", "bob")], keep=30 * DAY)
    assert in_database(url, lambda database: retention.forget(database, "alice")) == 250
    write_prompts(url, [prompt(ago(0.001), "alice")], keep=30 * DAY)
    assert sql(url, "SELECT DISTINCT key_id FROM prompts") == ["bob"]
    write_prompts(url, [prompt(ago(-0.001), "alice")], keep=30 * DAY)
    assert sql(url, "SELECT count(*) FROM prompts WHERE key_id = 'alice'") == [1]


def test_forgetting_reports_its_progress(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "REPORT_EVERY_S", 0)
    add_key(url, "alice", more="prompt_log = true")
    write_prompts(url, [prompt(ago(1), "alice") for _ in range(150)], keep=30 * DAY)
    reports: list[str] = []
    in_database(url, lambda database: retention.forget(database, "alice", reports.append))
    assert reports == ["prompts: 100 deleted", "prompts: 150 deleted"]


# ── regularly ──


def run_until(url: str, done: Callable[[], object]) -> None:
    async def run(database: Database) -> None:
        task = asyncio.create_task(retention.run_regularly(database, KEEP, first_after_s=0.01, every_s=0.01))
        await asyncio.to_thread(until, done, 10)
        task.cancel()
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

    in_database(url, run)


def test_retention_is_applied_regularly(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.retention")
    write(url, [row(ago(400))], [row(ago(1))])
    run_until(url, lambda: "retention: 1 audit rows" in caplog.text)
    assert month_of(ago(400)) in caplog.text and len(caplog.records) == 1


def test_an_unavailable_database_is_logged_once(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    async def away(*_: object) -> Removed:
        tried.append(1)
        if len(tried) == 5:
            return Removed()
        raise StoreUnavailable

    monkeypatch.setattr(retention, "apply", away)
    run_until(url, lambda: len(tried) > 9)
    assert [record.getMessage() for record in caplog.records] == [f"retention waits: {advice_for(StoreUnavailable())}"] * 2


def test_a_missing_schema_does_not_end_retention(
    empty_database: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    apply = retention.apply

    async def counting(*arguments: Any) -> Removed:
        tried.append(1)
        return await apply(*arguments)

    monkeypatch.setattr(retention, "apply", counting)
    run_until(empty_database, lambda: len(tried) > 3)
    assert "PostgreSQL refuses: Undefined" in caplog.text and "retention waits" in caplog.text
