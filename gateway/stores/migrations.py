"""The migrations of the database's schema, `sql/migrations`: numbered files, each applied once, in order."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import asyncpg

from gateway.core.errors import CommandFailed
from gateway.stores.postgres import SQL, UNAVAILABLE, Connection, Database, Row


class Migration(NamedTuple):
    version: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def read_migrations(folder: Path = SQL / "migrations") -> list[Migration]:
    files = sorted(folder.glob("[0-9]*.sql"))
    return [Migration(int(path.name[:4]), path.stem, path.read_text(encoding="utf-8")) for path in files]


async def is_current(database: Database) -> bool:
    """Whether the schema has all that this code needs. Raises StoreUnavailable."""
    # Migrations only add: a schema that a later version has extended still suits this one.
    return await database.schema_version() >= read_migrations()[-1].version


async def migrate(database: Database, on_progress: Callable[[str], None]) -> int:
    """Apply the missing migrations, all or none; returns how many were applied."""
    async with database.writing() as connection:
        await connection.execute(database.sql("lock_migrations"))
        await connection.execute(database.sql("make_migrations_table"))
        applied = {row["version"]: row for row in await connection.fetch(database.sql("applied_migrations"))}
        missing = [migration for migration in read_migrations() if not _is_applied(migration, applied)]
        for migration in missing:
            on_progress(f"applying {migration.name}")
            await _apply(migration, connection)
            await connection.execute(database.sql("note_migration"), migration.version, migration.name, migration.sha256)
    return len(missing)


async def _apply(migration: Migration, connection: Connection) -> None:
    try:
        await connection.execute(migration.sql, timeout=600)
    except UNAVAILABLE:
        raise
    except asyncpg.PostgresError as error:
        raise CommandFailed(f"migration {migration.name} failed, nothing was changed: {error}") from error


def _is_applied(migration: Migration, applied: dict[int, Row]) -> bool:
    row = applied.get(migration.version)
    if row is not None and row["sha256"] != migration.sha256:
        raise CommandFailed(f"migration {row['name']} was applied with another text: restore the file, add a new one instead")
    return row is not None
