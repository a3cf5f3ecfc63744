"""The migration that adds how calls were translated: old rows keep their hashes, both versions write the next ones."""

from typing import Any

import pytest

from tests.support.audit_rows import ago, row, sql, write
from tests.support.migrated_audit import OLD_HASHES, migrate, migrate_to, verdict

LAST_BEFORE = 7
CHAT = "/v1/chat/completions"
COLUMNS = "SELECT coalesce(translated_to, '-') || ' ' || coalesce(dropped, '-') FROM audit WHERE batch = 3 ORDER BY request_id"
# What a row may have in the new columns, and what of it is kept.
WAYS: list[tuple[dict[str, Any], str]] = [
    ({}, "- -"),
    ({"translated_to": "", "dropped": ""}, "- -"),
    ({"translated_to": CHAT, "dropped": ""}, f"{CHAT} -"),
    ({"translated_to": CHAT, "dropped": "metadata"}, f"{CHAT} metadata"),
    ({"translated_to": "", "dropped": "metadata"}, "- metadata"),
    ({"translated_to": "metadata", "dropped": ""}, "metadata -"),
]


@pytest.fixture
def url(empty_database: str) -> str:
    """A database of the version before the migration, with two batches of rows; some have what that version added last."""
    migrate_to(LAST_BEFORE, empty_database)
    batch = [row(ago(0)), row(ago(1), cached_tokens=3, billed_tokens=5), row(ago(40))]
    write(empty_database, batch, [row(ago(2), cached_tokens=0)])
    return empty_database


def test_old_rows_still_verify_and_new_rows_continue_the_chain(url: str) -> None:
    hashes = sql(url, OLD_HASHES)
    migrate(url)
    assert sql(url, OLD_HASHES) == hashes and verdict(url) == (0, 2, 4)
    write(url, [row(ago(0), request_id=str(number), **way) for number, (way, _) in enumerate(WAYS)], [row(ago(0))])
    assert verdict(url) == (0, 4, 5 + len(WAYS))
    assert sql(url, COLUMNS) == [kept for _, kept in WAYS]


def test_rows_of_the_version_before_have_neither_and_their_old_hash(url: str) -> None:
    """It writes rows that do not name the new columns, into the new schema."""
    same = [row(ago(0)), row(ago(1), cached_tokens=7)]
    write(url, same)
    hashes = sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3 ORDER BY id")
    sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    migrate(url)
    write(url, same)
    assert sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3 ORDER BY id") == hashes
    assert sql(url, COLUMNS) == ["- -", "- -"] and verdict(url) == (0, 3, 6)


def test_the_version_before_skips_columns_that_it_does_not_know(url: str) -> None:
    """A gateway of this version may have left rows in Redis that one of the version before moves to PostgreSQL."""
    write(url, [row(ago(0), translated_to=CHAT, dropped="metadata")])
    assert verdict(url) == (0, 3, 5)
    migrate(url)
    assert sql(url, COLUMNS) == ["- -"] and verdict(url) == (0, 3, 5)


def test_each_way_changes_the_hash(url: str) -> None:
    migrate(url)
    same = row(ago(0))
    seen = set()
    for way, _ in WAYS:
        write(url, [{**same, **way}])
        seen.update(sql(url, "SELECT audit_hash(a) FROM audit a WHERE batch = 3"))
        sql(url, "DELETE FROM audit WHERE batch = 3", "DELETE FROM audit_batches WHERE id = 3")
    assert len(seen) == len({kept for _, kept in WAYS})


def test_long_lists_of_names_are_cut(url: str) -> None:
    migrate(url)
    write(url, [row(ago(0), dropped="x" * 1000)])
    assert sql(url, "SELECT length(dropped) FROM audit WHERE batch = 3") == [400] and verdict(url) == (0, 3, 5)
