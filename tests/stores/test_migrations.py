"""The SQL: every query fits the migrated schema and is used; migrations go forward, once, whoever applies them."""

import asyncio
import re
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import asyncpg
import pytest

from gateway.core.errors import CommandFailed, StoreUnavailable
from gateway.stores import postgres
from gateway.stores.postgres import Database, Migration
from tests.conftest import TestStores

GATEWAY = Path(postgres.__file__).parents[1]
QUERY_FILES = sorted((postgres.SQL / "queries").glob("*.sql"))
QUERIES = postgres.queries()
HEAD = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def in_database(url: str, work: Callable[[Database], Awaitable[object]]) -> object:
    async def run() -> object:
        async with Database(url) as found:
            return await work(found)

    return asyncio.run(run())


def quiet(_: str) -> None:
    pass


def migrate(url: str) -> object:
    return in_database(url, lambda found: found.migrate(quiet))


def test_every_name_in_the_files_is_a_query() -> None:
    heads = [name for path in QUERY_FILES for name in HEAD.findall(path.read_text(encoding="utf-8"))]
    assert sorted(heads) == sorted(QUERIES), "a query without a sentence or a semicolon at its end is not found"


def test_every_query_has_a_sentence() -> None:
    for path in QUERY_FILES:
        for name, sentence in re.findall(r"^-- name: (\w+)\n(.*)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.fullmatch(r"-- [A-Z].{10,}\.", sentence), name


def test_there_is_no_sql_outside_the_queries() -> None:
    for path in QUERY_FILES:
        assert path.read_text(encoding="utf-8").startswith("-- name: ")
    statement = re.compile(r"\b(SELECT\s.*\sFROM|INSERT INTO|DELETE FROM|UPDATE\s+\w+\s+SET)\b")
    assert [path.name for path in GATEWAY.rglob("*.py") if statement.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_is_used(name: str) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in GATEWAY.rglob("*.py"))
    assert f'"{name}"' in sources


def test_every_query_fits_the_schema(stores: TestStores) -> None:
    async def prepare_all() -> list[str]:
        connection = await asyncpg.connect(stores.database_url)
        try:
            return [wrong for name, sql in QUERIES.items() if (wrong := await problem(connection, name, sql))]
        finally:
            await connection.close()

    assert asyncio.run(prepare_all()) == []


async def problem(connection: "asyncpg.Connection[asyncpg.Record]", name: str, sql: str) -> str:
    try:
        await connection.prepare(sql)
    except asyncpg.PostgresError as wrong:
        return f"{name}: {wrong}"
    return ""


def test_a_query_without_its_table_would_be_noticed(empty_database: str) -> None:
    async def prepare() -> str:
        connection = await asyncpg.connect(empty_database)
        try:
            return await problem(connection, "find_secret", QUERIES["find_secret"])
        finally:
            await connection.close()

    assert "does not exist" in asyncio.run(prepare())


def test_two_queries_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("-- name: one\n-- A sentence.\nSELECT 1;\n\n-- name: one\n-- A sentence.\nSELECT 2;\n")
    with pytest.raises(ValueError, match="two queries are named one"):
        postgres.queries(tmp_path)


def test_migrations_are_numbered_without_gaps() -> None:
    files = sorted(path.name for path in (postgres.SQL / "migrations").iterdir())
    assert all(re.fullmatch(r"\d{4}_[a-z_0-9]+\.sql", name) for name in files)
    assert [migration.version for migration in postgres.migrations()] == list(range(1, len(files) + 1))


def test_migrations_go_forward_only() -> None:
    for migration in postgres.migrations():
        # What a function may do later is not what the migration does.
        sql = re.sub(r"\$\$.*?\$\$", "", migration.sql, flags=re.DOTALL)
        assert not re.search(r"\b(DROP|TRUNCATE)\b|\bDOWN\b", sql, re.IGNORECASE), migration.name
        assert not re.search(r"^\s*(BEGIN|COMMIT|ROLLBACK)\b", sql, re.IGNORECASE | re.MULTILINE), migration.name


def test_an_empty_database_is_not_current_until_migrated_and_then_stays_so(empty_database: str) -> None:
    assert in_database(empty_database, lambda found: found.is_current()) is False
    assert migrate(empty_database) == len(postgres.migrations())
    assert in_database(empty_database, lambda found: found.is_current()) is True
    assert migrate(empty_database) == 0
    assert in_database(empty_database, lambda found: found.is_current()) is True


def test_each_migration_is_told_as_it_is_applied(empty_database: str) -> None:
    said: list[str] = []
    in_database(empty_database, lambda found: found.migrate(said.append))
    assert said == [f"applying {migration.name}" for migration in postgres.migrations()]


def test_migrators_at_once_all_succeed_and_one_does_the_work(empty_database: str) -> None:
    async def together() -> list[int]:
        async with Database(empty_database) as one, Database(empty_database) as two, Database(empty_database) as three:
            return await asyncio.gather(*(each.migrate(quiet) for each in (one, two, three)))

    assert sorted(asyncio.run(together())) == [0, 0, len(postgres.migrations())]


@pytest.fixture
def own_migrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "migrations"
    shutil.copytree(postgres.SQL / "migrations", folder)
    real: Callable[[Path], list[Migration]] = postgres.migrations
    monkeypatch.setattr(postgres, "migrations", lambda: real(folder))
    return folder


def test_an_edited_migration_is_refused_by_name(stores: TestStores, own_migrations: Path) -> None:
    first = min(own_migrations.iterdir())
    first.write_text(first.read_text() + "-- edited\n")
    with pytest.raises(CommandFailed, match=f"{first.stem} was applied with another text: restore the file"):
        migrate(stores.database_url)


def test_a_new_migration_is_applied_to_a_database_of_before(stores: TestStores, own_migrations: Path) -> None:
    number = len(postgres.migrations()) + 1
    (own_migrations / f"{number:04}_more.sql").write_text("CREATE TABLE more (id integer);\n")
    assert in_database(stores.database_url, lambda found: found.is_current()) is False
    assert migrate(stores.database_url) == 1
    assert in_database(stores.database_url, lambda found: found.is_current()) is True


def test_a_broken_migration_leaves_nothing_of_itself_or_of_those_before_it(empty_database: str, own_migrations: Path) -> None:
    number = len(postgres.migrations()) + 1
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
    async def note(found: Database) -> None:
        await found.run("note_migration", 9999, "9999_of_a_later_release", "0")

    in_database(stores.database_url, note)
    assert in_database(stores.database_url, lambda found: found.is_current()) is True


def test_a_database_where_nothing_was_applied_yet_is_not_current(empty_database: str) -> None:
    in_database(empty_database, lambda found: found.run("make_migrations_table"))
    assert in_database(empty_database, lambda found: found.is_current()) is False


@pytest.mark.parametrize(
    "change",
    [("/test_", "/there_is_no_"), ("gateway@", "nobody@"), ("port=5432", "port=1")],
    ids=["database", "user", "server"],
)
def test_what_cannot_be_reached_is_unavailable(stores: TestStores, change: tuple[str, str]) -> None:
    with pytest.raises(StoreUnavailable):
        in_database(stores.database_url.replace(*change), lambda found: found.is_current())
