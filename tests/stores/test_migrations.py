"""Migrations only add, and each is applied once, however many processes apply them at the same time."""

import asyncio
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from gateway.core.errors import CommandFailed
from gateway.stores import migrations
from gateway.stores.postgres import SQL, Database
from tests.conftest import TestStores

READ = migrations.read_migrations


def in_database(url: str, work: Callable[[Database], Awaitable[object]]) -> object:
    async def run() -> object:
        async with Database(url) as database:
            return await work(database)

    return asyncio.run(run())


def quiet(_: str) -> None:
    pass


def migrate(url: str) -> object:
    return in_database(url, lambda database: migrations.migrate(database, quiet))


def test_migrations_are_numbered_without_gaps() -> None:
    files = sorted(path.name for path in (SQL / "migrations").iterdir())
    assert all(re.fullmatch(r"\d{4}_[a-z_0-9]+\.sql", name) for name in files)
    assert [migration.version for migration in migrations.read_migrations()] == list(range(1, len(files) + 1))


def test_migrations_go_forward_only() -> None:
    for migration in migrations.read_migrations():
        # The body of a function is not what the migration does.
        sql = re.sub(r"\$\$.*?\$\$", "", migration.sql, flags=re.DOTALL)
        assert not re.search(r"\b(DROP|TRUNCATE)\b|\bDOWN\b", sql, re.IGNORECASE), migration.name
        assert not re.search(r"^\s*(BEGIN|COMMIT|ROLLBACK)\b", sql, re.IGNORECASE | re.MULTILINE), migration.name


def test_an_empty_database_is_current_once_it_is_migrated(empty_database: str) -> None:
    assert in_database(empty_database, migrations.is_current) is False
    assert migrate(empty_database) == len(migrations.read_migrations())
    assert in_database(empty_database, migrations.is_current) is True
    assert migrate(empty_database) == 0
    assert in_database(empty_database, migrations.is_current) is True


def test_progress_names_each_migration(empty_database: str) -> None:
    progress: list[str] = []
    in_database(empty_database, lambda database: migrations.migrate(database, progress.append))
    assert progress == [f"applying {migration.name}" for migration in migrations.read_migrations()]


def test_concurrent_migrators_all_succeed_and_one_applies_the_migrations(empty_database: str) -> None:
    async def migrate_together() -> list[int]:
        async with Database(empty_database) as one, Database(empty_database) as two, Database(empty_database) as three:
            return await asyncio.gather(*(migrations.migrate(each, quiet) for each in (one, two, three)))

    assert sorted(asyncio.run(migrate_together())) == [0, 0, len(migrations.read_migrations())]


@pytest.fixture
def own_migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "migrations"
    shutil.copytree(SQL / "migrations", folder)
    monkeypatch.setattr(migrations, "read_migrations", lambda: READ(folder))
    return folder


def test_an_edited_migration_is_refused_by_name(stores: TestStores, own_migrations: Path) -> None:
    first = min(own_migrations.iterdir())
    first.write_text(first.read_text() + "-- edited\n")
    with pytest.raises(CommandFailed, match=f"{first.stem} was applied with another text: restore the file"):
        migrate(stores.database_url)


def test_a_new_migration_is_applied_to_an_existing_database(stores: TestStores, own_migrations: Path) -> None:
    number = len(migrations.read_migrations()) + 1
    (own_migrations / f"{number:04}_more.sql").write_text("CREATE TABLE more (id integer);\n")
    assert in_database(stores.database_url, migrations.is_current) is False
    assert migrate(stores.database_url) == 1
    assert in_database(stores.database_url, migrations.is_current) is True


def test_if_one_migration_fails_none_is_applied(empty_database: str, own_migrations: Path) -> None:
    number = len(migrations.read_migrations()) + 1
    (own_migrations / f"{number:04}_broken.sql").write_text("CREATE TABLE half (id integer);\nSELECT nothing FROM nowhere;\n")
    with pytest.raises(CommandFailed, match=r"_broken failed, nothing was changed: .*nowhere"):
        migrate(empty_database)

    async def tables() -> list[str]:
        connection = await asyncpg.connect(empty_database)
        try:
            return [row[0] for row in await connection.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")]
        finally:
            await connection.close()

    assert asyncio.run(tables()) == []


def test_a_database_newer_than_this_code_is_current(stores: TestStores) -> None:
    async def note(database: Database) -> None:
        await database.run("note_migration", 9999, "9999_of_a_later_release", "0")

    in_database(stores.database_url, note)
    assert in_database(stores.database_url, migrations.is_current) is True


def test_a_database_without_migrations_is_not_current(empty_database: str) -> None:
    in_database(empty_database, lambda database: database.run("make_migrations_table"))
    assert in_database(empty_database, migrations.is_current) is False
