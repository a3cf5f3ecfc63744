"""The named queries: each fits the migrated schema and is used; a server that cannot be reached is unavailable."""

import asyncio
import re
from pathlib import Path

import asyncpg
import pytest

from gateway.core.errors import StoreUnavailable
from gateway.stores import migrations, postgres
from tests.conftest import TestStores
from tests.stores.test_migrations import in_database

GATEWAY = Path(postgres.__file__).parents[1]
QUERY_FILES = sorted((postgres.SQL / "queries").glob("*.sql"))
QUERIES = postgres.read_queries()
NAME_LINE = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def test_every_name_in_the_files_is_a_query() -> None:
    names = [name for path in QUERY_FILES for name in NAME_LINE.findall(path.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(QUERIES), "a query without a sentence or a semicolon at its end is not found"


def test_every_query_has_a_comment() -> None:
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
            return [error for name, sql in QUERIES.items() if (error := await error_of(connection, name, sql))]
        finally:
            await connection.close()

    assert asyncio.run(prepare_all()) == []


async def error_of(connection: "asyncpg.Connection[asyncpg.Record]", name: str, sql: str) -> str:
    try:
        await connection.prepare(sql)
    except asyncpg.PostgresError as error:
        return f"{name}: {error}"
    return ""


def test_a_query_on_a_missing_table_is_an_error(empty_database: str) -> None:
    async def prepare() -> str:
        connection = await asyncpg.connect(empty_database)
        try:
            return await error_of(connection, "find_secret", QUERIES["find_secret"])
        finally:
            await connection.close()

    assert "does not exist" in asyncio.run(prepare())


def test_two_queries_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.sql").write_text("-- name: one\n-- A sentence.\nSELECT 1;\n\n-- name: one\n-- A sentence.\nSELECT 2;\n")
    with pytest.raises(ValueError, match="two queries are named one"):
        postgres.read_queries(tmp_path)


@pytest.mark.parametrize(
    "change",
    [("/test_", "/there_is_no_"), ("gateway@", "nobody@"), ("port=5432", "port=1")],
    ids=["database", "user", "server"],
)
def test_a_server_that_cannot_be_reached_is_unavailable(stores: TestStores, change: tuple[str, str]) -> None:
    with pytest.raises(StoreUnavailable):
        in_database(stores.database_url.replace(*change), migrations.is_current)
