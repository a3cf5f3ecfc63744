"""All spellings of a model's name count as one model in sums, overview, metrics and filters; rows keep the requested name."""

import asyncio
import csv
import io
import time
from typing import Any

import asyncpg
import httpx
import pytest

from gateway.admin import values as admin_values
from gateway.auth.key import ADMIN
from gateway.dialects.model_names import canonical
from gateway.ops import main
from gateway.stores.postgres import Database
from tests.conftest import StartGateway, TestStores
from tests.dialects.test_model_names import ONE_MODEL
from tests.support.audit_rows import PLAIN, ago, in_database, row, sql, write
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.telemetry.test_metrics import TOKEN, fresh

MODEL = "llama3.2:latest"
OTHERS = (
    "llama3.2:7b llama3.2:3b me/llama3.2 hf.co/me/llama3.2 host:5000/ns/m host:5000/ns/m:q4 llama3.2:cloud gpt-oss:120b-cloud "
    "a://b://c x:// "
    "://x A:LOCAL:Local a/ a/: Qwen/Qwen2.5-7B library/library/x library/registry.ollama.ai/x : / :local library/ a\\b 100% "
    "'; $&\\1 模型 l%_ma"
).split()


def test_sql_and_python_know_the_same_names(stores: TestStores) -> None:
    spellings = [*ONE_MODEL, "  llama3.2  ", *OTHERS]

    async def names() -> list[Any]:
        connection = await asyncpg.connect(stores.database_url)
        try:
            return await connection.fetch("SELECT canonical_model(n) AS name FROM unnest($1::text[]) AS n", spellings)
        finally:
            await connection.close()

    assert [found["name"] for found in asyncio.run(names())] == [canonical(name).canonical for name in spellings]
    assert sql(stores.database_url, "SELECT canonical_model('')") == [""], "an empty name stays empty"


@pytest.fixture
def asked(stores: TestStores) -> str:
    """Audit rows, each with the name as it was requested."""
    rows = [row(ago(1), model=name) for name in [*ONE_MODEL, "llama3.2:3b", "Qwen/Qwen3", "qwen/qwen3:latest", ""]]
    write(stores.database_url, rows)
    return stores.database_url


def printed(stores: TestStores, capsys: pytest.CaptureFixture[str], *typed: str) -> list[dict[str, str]]:
    arguments = main.parser().parse_args([*typed, "--csv"])
    asyncio.run(
        main.VERBS[arguments.verb][0](settings_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url), arguments)
    )
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_old_rows_are_summed_with_new_ones(asked: str, stores: TestStores, capsys: pytest.CaptureFixture[str]) -> None:
    for by in ("model", "model,backend", "day,model"):
        found = {line["model"]: int(line["requests"]) for line in printed(stores, capsys, "usage", "--by", by)}
        assert found == {MODEL: len(ONE_MODEL), "llama3.2:3b": 1, "qwen/qwen3:latest": 2, "": 1}
    (line,) = printed(stores, capsys, "usage", "--by", "backend")
    assert int(line["requests"]) == len(ONE_MODEL) + 4
    assert {found["model"] for found in printed(stores, capsys, "audit")} > set(ONE_MODEL), "a row has the requested name"
    arguments = main.parser().parse_args(["audit-verify"])
    asyncio.run(main.VERBS[arguments.verb][0](settings_for(DATABASE_URL=asked, REDIS_URL=stores.redis_url), arguments))


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        *((name, len(ONE_MODEL)) for name in ONE_MODEL),
        ("llama3.2*", len(ONE_MODEL) + 1),
        ("llama3.?", len(ONE_MODEL)),
        ("*:latest", len(ONE_MODEL) + 2),
        ("QWEN/*", 2),
        ("library/*", 0),
        ("*", len(ONE_MODEL) + 4),
        ("llama", 0),
        ("%", 0),
    ],
)
def test_a_filter_finds_every_spelling(
    asked: str, stores: TestStores, capsys: pytest.CaptureFixture[str], wanted: str, rows: int
) -> None:
    assert len(printed(stores, capsys, "audit", "--model", wanted)) == rows


def test_a_filter_costs_little_more_than_reading_every_row(stores: TestStores) -> None:
    columns = ", ".join(PLAIN)
    write(stores.database_url, [row(ago(1), model="mistral:7b")])
    copied = columns.replace("model,", "(ARRAY['llama3.2', 'mistral:7b', 'Qwen/Qwen2.5-7B'])[1 + n % 3],", 1)
    more = f"INSERT INTO audit (id, at, batch, {columns}) SELECT gen_random_uuid(), at, batch, {copied}"
    sql(stores.database_url, f"{more} FROM audit, generate_series(1, 30000) AS n", "ANALYZE audit")  # our own names

    async def best(database: Database, query: str, *values: object) -> float:
        took = []
        async with database.connection() as connection:
            for _ in range(3):
                began = time.monotonic()
                await connection.fetch(query, *values, timeout=60)
                took.append(time.monotonic() - began)
        return min(took)

    async def compare(database: Database) -> tuple[float, float]:
        models, *more = admin_values.model_filter("gpt-oss:20b")
        asked = (None, models, None, None, None, None, 100, *more)
        plain = "SELECT id FROM audit WHERE model ILIKE '%gpt-oss:20b%'"
        return await best(database, database.sql("list_audit"), *asked), await best(database, plain)

    # A real cost appears every time, other load of the machine only now and then.
    found: list[tuple[float, float]] = []
    while not any(filtered < 3 * plain for filtered, plain in found) and len(found) < 5:
        found.append(in_database(stores.database_url, compare))
    assert any(filtered < 3 * plain for filtered, plain in found), found


@pytest.mark.parametrize(
    "wanted", ["*", "*:latest", "*:70b", "llama*", "llama3.2:l*", "a:*", "*/m*", "??", "x", "a:b/c", "l%_ma", "*c*t"]
)
def test_the_filter_by_pattern_loses_no_row(stores: TestStores, wanted: str) -> None:
    spellings = [*ONE_MODEL, "  llama3.2  ", "llama3.2:70b", "LLAMA3.2:70B:local", "a:b/c", *OTHERS]
    write(stores.database_url, [row(ago(1), model=name) for name in spellings])
    models, *more = admin_values.model_filter(wanted)
    asked = (None, models, None, None, None, None, None, *more)
    found = in_database(stores.database_url, lambda database: database.rows("list_audit", *asked))
    exact = "SELECT model FROM audit WHERE canonical_model(model) LIKE ANY ($1)"

    async def all_of_it(database: Database) -> list[str]:
        async with database.connection() as connection:
            return [each["model"] for each in await connection.fetch(exact, models)]

    assert sorted(each["model"] for each in found) == sorted(in_database(stores.database_url, all_of_it))


def test_reports_overview_and_metrics_use_one_name(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, METRICS_TOKEN=TOKEN)
    unknown_models = [f"invented-{number}" for number in range(3)]
    with gateway.http(gateway.key()) as client:
        for name in [*ONE_MODEL, *unknown_models]:
            client.post("/api/chat", json={"model": name, "messages": [{"role": "user", "content": "hi"}], "stream": False})
    gateway.audit_rows()
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:

        def got(path: str, **query: str) -> Any:
            answered: httpx.Response = admin.get(f"/admin/v1/{path}", params=query)
            assert answered.status_code == 200, answered.text
            return answered.json()

        lines = {line["model"]: line["requests"] for line in got("usage", by="model") if line["model"]}
        assert lines == {MODEL: len(ONE_MODEL), **{f"{name}:latest": 1 for name in unknown_models}}
        assert {line["model"]: line["requests"] for line in got("overview")["lately"]["models"]} == lines
        for spelling in (MODEL, "llama3.2", "LIBRARY/llama3.2"):
            assert sorted(line["model"] for line in got("audit", model=spelling)) == sorted(ONE_MODEL)
        assert admin.get("/admin/v1/audit", params={"model": "x" * 351}).status_code == 400
    labels = {dict(labels).get("model") for _, labels in fresh(gateway)}
    assert labels - {None, ""} == {"other", MODEL}
