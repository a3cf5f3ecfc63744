"""The migration that adds the seconds of backends: old rows keep their hashes, both versions write the next ones."""

from typing import Any

import pytest

from tests.support.audit_rows import add_key, ago, row, sql, write
from tests.support.migrated_audit import OLD_HASHES, migrate, migrate_to, verdict

LAST_BEFORE = 8
# What a row may have in the new columns.
FACTS: list[dict[str, Any]] = [
    {},
    {"load_ms": 1.5},
    {"prefill_ms": 1.5},
    {"decode_ms": 1.5},
    {"backend_ms": 1.5},
    {"seconds_from": "none"},
    {"loaded": False},
    {"loaded": True},
    {"chosen_because": "home"},
    {"estimated_ms": 1.5},
]
NAMES = tuple({name: None for facts in FACTS for name in facts})
COLUMNS = f"SELECT num_nonnulls({', '.join(NAMES)}) FROM audit WHERE batch = 3 ORDER BY request_id"


@pytest.fixture
def url(empty_database: str) -> str:
    """A database of the version before the migration, with two batches of rows; some have what that version added last."""
    migrate_to(LAST_BEFORE, empty_database)
    batch = [row(ago(0)), row(ago(1), cached_tokens=3, billed_tokens=5), row(ago(40))]
    write(empty_database, batch, [row(ago(2), translated_to="/v1/chat/completions", dropped="metadata")])
    return empty_database


def test_old_rows_still_verify_and_new_rows_continue_the_chain(url: str) -> None:
    hashes = sql(url, OLD_HASHES)
    migrate(url)
    assert sql(url, OLD_HASHES) == hashes and verdict(url) == (0, 2, 4)
    write(url, [row(ago(0), request_id=str(number), **facts) for number, facts in enumerate(FACTS)], [row(ago(0))])
    assert verdict(url) == (0, 4, 5 + len(FACTS))
    assert sql(url, COLUMNS) == [len(facts) for facts in FACTS]


def test_rows_of_the_version_before_have_none_of_them_and_their_old_hash(url: str) -> None:
    """It writes rows that do not name the new columns, into the new schema."""
    same = [row(ago(0)), row(ago(1), dropped="metadata")]
    write(url, same)
    hashes = sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3 ORDER BY id")
    sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    migrate(url)
    write(url, same)
    assert sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3 ORDER BY id") == hashes
    assert sql(url, COLUMNS) == [0, 0] and verdict(url) == (0, 3, 6)


def test_the_version_before_skips_columns_that_it_does_not_know(url: str) -> None:
    """A gateway of this version may have left rows in Redis that one of the version before moves to PostgreSQL."""
    write(url, [row(ago(0), backend_ms=4.0, seconds_from="slot", loaded=True)])
    assert verdict(url) == (0, 3, 5)
    migrate(url)
    assert sql(url, COLUMNS) == [0] and verdict(url) == (0, 3, 5)


def test_each_fact_changes_the_hash(url: str) -> None:
    migrate(url)
    same = row(ago(0))
    seen = set()
    for facts in FACTS:
        write(url, [{**same, **facts}])
        seen.update(sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3"))
        sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    assert len(seen) == len(FACTS)


def test_keys_of_before_have_the_weight_of_one_and_no_new_limits(url: str) -> None:
    add_key(url, "old")
    migrate(url)
    # The version before makes keys without naming the new columns.
    add_key(url, "older")
    new = "weight = 1 AND heartbeat_after_s IS NULL AND day_seconds IS NULL AND month_seconds IS NULL"
    assert sql(url, f"SELECT {new} FROM keys") == [True, True]
