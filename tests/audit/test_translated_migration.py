"""The migration that adds how calls were translated: old rows keep their hashes, both versions write the next ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.audit import hash_chain
from gateway.stores import migrations
from gateway.stores.migrations import Migration
from tests.support.audit_rows import ago, in_database, row, sql, write

LAST_BEFORE = 7
CHAT = "/v1/chat/completions"
REAL: Callable[..., list[Migration]] = migrations.read_migrations
HASHES = "SELECT audit_hash(a) FROM audit a WHERE batch <= 2 ORDER BY id"
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


def quiet(_: str) -> None:
    pass


def migrate(url: str) -> None:
    in_database(url, lambda found: migrations.migrate(found, quiet))


@pytest.fixture
def url(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database of the version before the migration, with two batches of rows; some have what that version added last."""
    with monkeypatch.context() as before:
        before.setattr(migrations, "read_migrations", lambda folder=Path(): REAL()[:LAST_BEFORE])
        migrate(empty_database)
    batch = [row(ago(0)), row(ago(1), cached_tokens=3, billed_tokens=5), row(ago(40))]
    write(empty_database, batch, [row(ago(2), cached_tokens=0)])
    assert sql(empty_database, "SELECT max(version) FROM schema_migrations") == [LAST_BEFORE]
    return empty_database


def verdict(url: str) -> tuple[int, int, int]:
    found = in_database(url, lambda database: hash_chain.verify(database, quiet))
    return found.count, found.batches, found.rows


def test_old_rows_still_verify_and_new_rows_continue_the_chain(url: str) -> None:
    hashes = sql(url, HASHES)
    migrate(url)
    assert sql(url, HASHES) == hashes and verdict(url) == (0, 2, 4)
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
