"""The migration that adds the place in the queue: old rows keep their hashes, both versions write the next ones."""

import pytest

from tests.support.audit_rows import ago, row, sql, write
from tests.support.migrated_audit import OLD_HASHES, migrate, migrate_to, verdict

LAST_BEFORE = 9
POSITIONS = "SELECT queue_position FROM audit WHERE batch = 3 ORDER BY request_id"


@pytest.fixture
def url(empty_database: str) -> str:
    """A database of the version before the migration, with two batches of rows; some have what that version added last."""
    migrate_to(LAST_BEFORE, empty_database)
    batch = [row(ago(0)), row(ago(1), cached_tokens=3, billed_tokens=5), row(ago(40))]
    write(empty_database, batch, [row(ago(2), backend_ms=3.5, seconds_from="slot", chosen_because="home")])
    return empty_database


def test_old_rows_still_verify_and_new_rows_continue_the_chain(url: str) -> None:
    hashes = sql(url, OLD_HASHES)
    migrate(url)
    assert sql(url, OLD_HASHES) == hashes and verdict(url) == (0, 2, 4)
    write(url, [row(ago(0), request_id="1", queue_position=7), row(ago(0), request_id="2", queue_position=0)], [row(ago(0))])
    assert verdict(url) == (0, 4, 7) and sql(url, POSITIONS) == [7, None]


def test_rows_of_the_version_before_have_none_and_their_old_hash(url: str) -> None:
    """It writes rows that do not name the new column, into the new schema."""
    same = [row(ago(0)), row(ago(1), loaded=True)]
    write(url, same)
    hashes = sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3 ORDER BY id")
    sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    migrate(url)
    write(url, same)
    assert sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3 ORDER BY id") == hashes
    assert sql(url, POSITIONS) == [None, None] and verdict(url) == (0, 3, 6)


def test_the_version_before_skips_what_it_does_not_know(url: str) -> None:
    """A gateway of this version may have left rows in Redis that one of the version before moves to PostgreSQL."""
    write(url, [row(ago(0), queue_position=4)])
    assert verdict(url) == (0, 3, 5)
    migrate(url)
    assert sql(url, POSITIONS) == [None] and verdict(url) == (0, 3, 5)


def test_the_place_changes_the_hash(url: str) -> None:
    migrate(url)
    same = row(ago(0))
    seen = set()
    for position in (0, 1, 2):
        write(url, [{**same, "queue_position": position}])
        seen.update(sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3"))
        sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    assert len(seen) == 3
