"""A database of an earlier version whose audit a test fills, migrates and verifies."""

from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.audit import hash_chain
from gateway.stores import migrations
from gateway.stores.migrations import Migration
from tests.support.audit_rows import in_database, sql

READ: Callable[..., list[Migration]] = migrations.read_migrations
# The hashes of the rows in the two batches that are there before the migration.
OLD_HASHES = "SELECT audit_hash(a) FROM audit a WHERE batch <= 2 ORDER BY id"


def quiet(_: str) -> None:
    pass


def migrate(url: str) -> None:
    in_database(url, lambda found: migrations.migrate(found, quiet))


def migrate_to(version: int, url: str) -> None:
    with pytest.MonkeyPatch.context() as before:
        before.setattr(migrations, "read_migrations", lambda folder=Path(): READ()[:version])
        migrate(url)
    assert sql(url, "SELECT max(version) FROM schema_migrations") == [version]


def verdict(url: str) -> tuple[int, int, int]:
    found = in_database(url, lambda database: hash_chain.verify(database, quiet))
    return found.count, found.batches, found.rows
