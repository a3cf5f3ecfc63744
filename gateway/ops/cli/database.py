"""The verbs for PostgreSQL: bring the schema up to date, open its shell; and the database as other verbs need it."""

import argparse
import os
import re
import shutil
import subprocess  # runs psql with our own arguments  # nosec B404
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, unquote

from gateway.components import database_of
from gateway.core.errors import CommandFailed, StoreUnavailable
from gateway.ops.cli import console
from gateway.settings import Settings
from gateway.stores import migrations
from gateway.stores.postgres import Database, advice_for
from gateway.stores.urls import split as address_parts

LIBPQ = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "dbname": "PGDATABASE",
    "database": "PGDATABASE",
    "sslmode": "PGSSLMODE",
    "sslrootcert": "PGSSLROOTCERT",
    "sslcert": "PGSSLCERT",
    "sslkey": "PGSSLKEY",
}


@asynccontextmanager
async def current_database(settings: Settings) -> AsyncIterator[Database]:
    """With a current schema: a private database is migrated, of any other it is required. Raises CommandFailed."""
    async with database_of(settings) as database:
        if settings.has_private_database:
            await migrations.migrate(database, console.notify)
        await require_schema(database)
        yield database


async def require_schema(database: Database) -> None:
    try:
        if not await migrations.is_current(database):
            raise CommandFailed("the database's schema is not current: run `make migrate`")
    except StoreUnavailable as unavailable:
        raise CommandFailed(advice_for(unavailable)) from None


async def migrate(settings: Settings, arguments: argparse.Namespace) -> None:
    async with database_of(settings) as database:
        try:
            applied = await migrations.migrate(database, console.notify)
        except StoreUnavailable as unavailable:
            raise CommandFailed(advice_for(unavailable)) from None
    console.show_facts({"applied": applied, "schema": "current"}, as_json=arguments.json)


def psql(settings: Settings, options: Sequence[str]) -> int:
    """The database's own shell; the password is passed in the environment, where `ps` does not show it."""
    program = shutil.which("psql")
    if program is None:
        raise CommandFailed("psql is not installed: install PostgreSQL's client (Debian: postgresql-client)")
    return subprocess.call([program, *options], env={**os.environ, **_libpq(settings.database_url)})  # nosec B603


def _libpq(address: str) -> dict[str, str]:
    """The address as variables for PostgreSQL's own programs."""
    parts = address_parts(address)
    login, _, places = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    hosts = [place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "") for place in places.split(",")]
    variables = {
        "PGHOST": ",".join(host.strip("[]") for host, _, _ in hosts),
        "PGPORT": ",".join(port for _, _, port in hosts).strip(","),
        "PGUSER": unquote(user),
        "PGPASSWORD": unquote(password),
        "PGDATABASE": unquote(parts.path.lstrip("/")),
    }
    parameters = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    variables |= {variable: parameters[name] for name, variable in LIBPQ.items() if name in parameters}
    return {name: value for name, value in variables.items() if value}
