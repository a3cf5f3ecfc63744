"""The verbs for PostgreSQL, and what all verbs report when it is down or refuses."""

import os
import secrets
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.stores.test_database_errors import become_standby, run_sql
from tests.support.operator import CANARY, Operator

AWAY = "error: PostgreSQL does not answer: check DATABASE_URL and that the server runs\n"


def test_migrate(operator: Operator, empty_database: str) -> None:
    operator.names["DATABASE_URL"] = empty_database
    assert "run `make migrate`" in operator.is_refused("keys")
    done = operator.types("migrate")
    assert done.returncode == 0 and "applying 0001_keys" in done.stderr
    assert operator.gets_json("migrate")["applied"] == 0
    assert operator.gets("keys").startswith("no keys yet")


@pytest.mark.parametrize(
    "words", [["keys"], ["key", "--name", "a"], ["rotate", "--key", "a"], ["revoke", "--key", "a"], ["migrate"]]
)
def test_a_database_that_is_down(operator: Operator, words: list[str]) -> None:
    last_line = operator.is_refused(*words, DATABASE_URL="postgresql://u:p@127.0.0.1:1/d").splitlines(keepends=True)[-1]
    assert last_line == AWAY


def test_a_database_that_does_not_exist(operator: Operator) -> None:
    url = operator.names["DATABASE_URL"].replace("/test_", "/there_is_no_")
    assert AWAY in operator.is_refused("keys", DATABASE_URL=url)


def test_a_database_that_refuses_is_not_reported_as_down(operator: Operator) -> None:
    """With a right that is missing, and where it only reads."""
    role = f"reader_{secrets.token_hex(4)}"
    statements = [f"CREATE ROLE {role} LOGIN PASSWORD 'p'", f"GRANT SELECT ON schema_migrations TO {role}"]
    url = operator.names["DATABASE_URL"]
    run_sql(url, *statements)
    parts = urlsplit(url)
    as_reader = parts._replace(netloc=f"{role}:p@{parts.netloc.rpartition('@')[2]}").geturl()
    printed = operator.is_refused("keys", DATABASE_URL=as_reader)
    assert "error: PostgreSQL refuses: InsufficientPrivilegeError: permission denied" in printed and AWAY not in printed
    become_standby(url)
    for words in (["key", "--name", "a"], ["migrate"]):
        printed = operator.is_refused(*words)
        assert "error: PostgreSQL takes no writes: name the primary in DATABASE_URL" in printed and AWAY not in printed


@pytest.mark.skipif(shutil.which("psql") is None, reason="psql is not installed")
def test_psql(operator: Operator) -> None:
    assert operator.gets("psql", "-Atc", "select current_database()").strip() in operator.names["DATABASE_URL"]
    assert operator.gets("psql", "--", "-A", "-t", "-c", "select 1") == "1\n"
    assert operator.types("psql", "-c", "select nothing").returncode == 1


def test_psql_gets_the_url_in_environment_variables(operator: Operator, tmp_path: Path) -> None:
    (tmp_path / "psql").write_text('#!/bin/sh\necho "$@"; env | grep ^PG | sort\n')
    (tmp_path / "psql").chmod(0o755)
    url = f"postgresql://us%40er:{CANARY}%2F@one:1,[::1]:2/some%20where?sslmode=require"
    printed = operator.gets("psql", "-c", "x", DATABASE_URL=url, PATH=f"{tmp_path}:{os.environ['PATH']}").splitlines()
    assert printed == [
        "-c x",
        "PGDATABASE=some where",
        "PGHOST=one,::1",
        f"PGPASSWORD={CANARY}/",
        "PGPORT=1,2",
        "PGSSLMODE=require",
        "PGUSER=us@er",
    ]


def test_psql_that_is_not_installed(operator: Operator, tmp_path: Path) -> None:
    assert "install PostgreSQL's client" in operator.is_refused("psql", PATH=str(tmp_path))
