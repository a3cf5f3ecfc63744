"""The hash chain shows rows of the audit that were changed, deleted or added since they were written."""

import pytest

from gateway.audit import hash_chain
from gateway.audit.hash_chain import Verdict
from gateway.stores.postgres import Database
from tests.conftest import TestStores
from tests.support.audit_rows import ago, in_database, row, sql, write

A_ROW = "(SELECT id FROM audit WHERE batch = 2 ORDER BY id LIMIT 1)"
COPY = """INSERT INTO audit SELECT (jsonb_populate_record(a, jsonb_build_object('id', gen_random_uuid(), 'batch', {batch}))).*
          FROM audit a WHERE id = {row}"""


@pytest.fixture
def url(stores: TestStores) -> str:
    """Three batches of three rows, some of another month."""
    write(stores.database_url, *([row(ago(days)) for days in (1, 2, 40)] for _ in range(3)))
    return stores.database_url


def verify(url: str) -> Verdict:
    return in_database(url, lambda database: hash_chain.verify(database, lambda _: None))


def findings(url: str) -> list[tuple[int, str, int | None, int]]:
    found = verify(url)
    assert found.count == len(found.findings)
    return [(each.batch, each.found, each.rows_expected, each.rows_found) for each in found.findings]


def test_an_unchanged_audit_verifies(url: str) -> None:
    found = verify(url)
    assert (found.count, found.batches, found.rows, found.purged, found.newest_batch) == (0, 3, 9, 0, 3)
    assert [found.digest] == sql(url, "SELECT digest FROM audit_batches WHERE id = 3")


def test_an_empty_audit_verifies(stores: TestStores) -> None:
    assert verify(stores.database_url) == Verdict()


@pytest.mark.parametrize(
    "change",
    [
        "status = 201",
        "prompt_tokens = prompt_tokens + 1",
        "cached_tokens = 0",
        "billed_tokens = 7",
        "translated_to = '/v1/completions'",
        "dropped = 'metadata'",
        "ttfb_ms = NULL",
        "total_ms = total_ms + 0.0000000000001",
        "attempts = '[{}]'",
        "at = at + interval '1 microsecond'",
        "key_id = key_id || 'x', model = left(model, 3)",
        "id = gen_random_uuid()",
    ],
)
def test_a_changed_row_is_found(url: str, change: str) -> None:
    sql(url, f"UPDATE audit SET {change} WHERE id = {A_ROW}")
    assert findings(url) == [(2, "changed: at least one row is not as it was written", 3, 3)]


def test_a_finding_has_the_day_and_time_of_its_batch(url: str) -> None:
    sql(url, f"UPDATE audit SET status = 0 WHERE id = {A_ROW}")
    (found,) = verify(url).findings
    assert [found.at] == sql(url, "SELECT at FROM audit_batches WHERE id = 2")
    assert [found.day] == sql(url, "SELECT day FROM audit_batches WHERE id = 2")


def test_a_deleted_row_is_found(url: str) -> None:
    sql(url, f"DELETE FROM audit WHERE id = {A_ROW}")
    assert findings(url) == [(2, "missing rows: 1", 3, 2)]


def test_an_added_row_is_found(url: str) -> None:
    sql(url, COPY.format(row=A_ROW, batch=2))
    assert findings(url) == [(2, "added rows: 1", 3, 4)]


@pytest.mark.parametrize("batch", [-5, 0, 4, 10**12])
def test_a_row_of_an_unknown_batch_is_found(url: str, batch: int) -> None:
    sql(url, COPY.format(row=A_ROW, batch=batch))
    assert findings(url) == [(batch, "added: the chain has no such batch", None, 1)]


def test_a_row_moved_to_another_batch_is_found(url: str) -> None:
    sql(url, f"UPDATE audit SET batch = 3 WHERE id = {A_ROW}")
    assert findings(url) == [(2, "missing rows: 1", 3, 2), (3, "added rows: 1", 3, 4)]


def test_a_replaced_row_is_found(url: str) -> None:
    sql(url, f"DELETE FROM audit WHERE id = {A_ROW}", COPY.format(row=A_ROW, batch=2))
    assert [words[:7] for _, words, _, _ in findings(url)] == ["changed"]


def test_a_missing_batch_is_found(url: str) -> None:
    sql(url, "DELETE FROM audit_batches WHERE id = 2")
    assert findings(url) == [(2, "missing: the batch", None, 3)]
    sql(url, "DELETE FROM audit WHERE batch = 2")
    assert findings(url) == [(2, "missing: the batch", None, 0)]


def test_a_missing_first_batch_is_found(url: str) -> None:
    sql(url, "DELETE FROM audit_batches WHERE id < 3", "DELETE FROM audit WHERE batch < 3")
    assert findings(url) == [(1, "missing: all batches up to 2", None, 0)]


def test_a_recomputed_batch_breaks_the_chain_after_it(url: str) -> None:
    hashes = "SELECT string_agg(audit_hash(a), ''::bytea ORDER BY audit_hash(a)) FROM audit a WHERE batch = 2"
    sql(
        url,
        f"UPDATE audit SET status = 500 WHERE id = {A_ROW}",
        f"UPDATE audit_batches SET digest = sha256(previous || ({hashes})) WHERE id = 2",
    )
    assert findings(url) == [(3, "broken chain: this batch does not continue the one before it", 3, 3)]


@pytest.mark.parametrize("anchor", ["0, '\\x00'", "2, '\\x00'"])
def test_a_forged_start_of_the_chain_is_found(url: str, anchor: str) -> None:
    sql(url, f"INSERT INTO audit_anchor (batch, digest) VALUES ({anchor})")
    assert any("broken chain" in words for _, words, _, _ in findings(url))


def test_forged_hashes_of_purged_rows_are_found(url: str) -> None:
    sql(url, "UPDATE audit_batches SET purged = sha256('x') WHERE id = 1", "UPDATE audit_batches SET gone = true WHERE id = 3")
    assert findings(url) == [(1, "added rows: 1", 3, 4), (3, "added rows: 3", 0, 3)]


def test_the_hash_does_not_depend_on_session_settings(url: str) -> None:
    plain = sql(url, "SELECT audit_hash(a) FROM audit a ORDER BY id")
    odd = {"TimeZone": "Asia/Kathmandu", "DateStyle": "German", "extra_float_digits": "-10", "bytea_output": "escape"}
    assert (
        sql(url, *(f"SET {name} = '{value}'" for name, value in odd.items()), "SELECT audit_hash(a) FROM audit a ORDER BY id")
        == plain
    )


def test_many_batches_are_verified_in_steps(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_chain, "BATCHES_AT_ONCE", 5)
    monkeypatch.setattr(hash_chain, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(hash_chain, "REPORT_EVERY_S", 0)
    write(url, *([row(ago(1)) for _ in range(size)] for size in (1, 20, 1, 1, 1, 1, 1, 1)))
    reports: list[str] = []
    found = in_database(url, lambda database: hash_chain.verify(database, reports.append))
    assert (found.count, found.batches, found.rows) == (0, 11, 36)
    assert len(reports) > 3 and reports[-1] == "11 batches with 36 rows checked, 0 findings"
    sql(url, "DELETE FROM audit WHERE batch IN (2, 5, 6, 11)")
    assert [batch for batch, _, _, _ in findings(url)] == [2, 5, 6, 11]


def test_the_first_of_many_findings_are_kept(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_chain, "MOST_FINDINGS", 2)
    sql(url, "DELETE FROM audit")
    found = verify(url)
    assert found.count == 3 and [each.batch for each in found.findings] == [1, 2]


def test_purging_during_verification_is_not_reported_as_tampering(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of the chain moves past the verified part between two steps."""
    monkeypatch.setattr(hash_chain, "BATCHES_AT_ONCE", 1)
    anchor = "INSERT INTO audit_anchor SELECT true, id, digest FROM audit_batches WHERE id = 2"
    purge = ["DELETE FROM audit WHERE batch < 3", anchor]

    async def run(database: Database) -> Verdict:
        walk = hash_chain.Walk(database)
        assert await walk.step()
        for statement in purge:
            async with database.connection() as connection:
                await connection.execute(statement)
        while await walk.step():
            pass
        return walk.verdict

    found = in_database(url, run)
    assert (found.count, found.batches, found.newest_batch) == (0, 2, 3)
