"""`make doctor`: a healthy installation has no problem, and each thing that is broken is found, with what to do."""

import argparse
import asyncio
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from gateway.core.errors import CommandFailed
from gateway.fleet.backends.config import BackendConfig
from gateway.ops.cli import installation, serve
from gateway.ops.doctor import finding as doctor_finding
from gateway.ops.doctor import postgres, redis, report
from gateway.ops.doctor import settings as doctor_settings
from gateway.ops.doctor.finding import Finding
from gateway.settings import LOCAL_RUN, Settings
from gateway.stores.redis_keys import BY_SHARD
from tests.conftest import TestStores
from tests.support import fork_server
from tests.support.audit_rows import ago, row, write
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of, environment_for, settings_for
from tests.support.processes import environment
from tests.support.project import PROJECT

AWAY = "postgresql://u:canary-6f21@127.0.0.1:1/d"
NO_REDIS = "unix:///nowhere/redis.sock"
GOOD_PASSWORD = "Tr0ub4dor-and-3-more"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installation's folder, where its `.env` would be."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def findings_of(settings: Settings) -> dict[str, Finding]:
    findings = asyncio.run(report.check_all(settings))
    names = [found.check for found in findings]
    assert sorted(names) == sorted(set(names))
    return {found.check: found for found in findings}


Examine = Callable[..., dict[str, Finding]]


@pytest.fixture
def examine(stores: TestStores) -> Examine:
    """`examine(backend, …, NAME="value")`: the findings, by the check's name."""

    def run(*backends: object, **names: str) -> dict[str, Finding]:
        return findings_of(
            settings_for(*backends, **{"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url, **names})
        )

    return run


def sql(url: str, statement: str) -> None:
    async def run() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    asyncio.run(run())


def matches(found: Finding, state: str, what: str, advice: str = "") -> bool:
    assert (found.state, bool(found.advice)) == (state, state != "ok"), found
    assert what in found.found and advice in found.advice, found
    return True


def types(folder: Path, *words: str, **names: str) -> subprocess.CompletedProcess[str]:
    done = fork_server.gateway().run("gateway", ("doctor", *words), folder, environment(names), timeout_s=60)
    assert "Traceback" not in done.stdout + done.stderr
    return done


# ── the whole ──


def test_a_healthy_installation_has_no_problem(folder: Path, stores: TestStores, alpha: FakeBackend) -> None:
    names = environment_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)
    done = types(folder, "--json", **names)
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and "problems: 0, warnings: " in done.stderr
    states = {row["check"]: row["state"] for row in rows}
    # The private server of the tests keeps nothing; nobody has made a key or let a gateway run.
    warned = {"keys", "audit months", "Redis persistence"}
    assert {check for check, state in states.items() if state != "ok"} == warned
    assert all(set(row) == {"check", "state", "found", "what_to_do"} for row in rows)
    assert all(bool(row["what_to_do"]) == (row["state"] != "ok") for row in rows)
    assert not [call for call in alpha.requests if call.body and b"messages" in call.body]


def test_a_perfect_installation_has_no_warning(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    sql(stores.database_url, "INSERT INTO keys (id, name) VALUES ('a', 'a')")
    sql(stores.database_url, "SELECT audit_make_partition(now()), audit_make_partition(now() + interval '1 month')")
    found = examine(alpha)
    assert {check for check, finding in found.items() if finding.state != "ok"} == {"Redis persistence"}
    assert matches(found["keys"], "ok", "1 active")


def test_everything_that_is_down_is_found_and_shown_in_the_table(folder: Path, alpha: FakeBackend) -> None:
    alpha.stop()
    done = types(folder, **environment_for(alpha, DATABASE_URL=AWAY, REDIS_URL=NO_REDIS))
    head, *lines = done.stdout.splitlines()
    assert done.returncode == 1 and head.split() == "CHECK STATE FOUND WHAT TO DO".split()
    printed = {line.split("  ")[0]: line for line in lines}
    assert all(" problem " in printed[check] for check in ("PostgreSQL", "Redis", "backend alpha"))
    assert "check DATABASE_URL" in printed["PostgreSQL"] and "check REDIS_URL" in printed["Redis"]
    assert done.stderr.splitlines()[-1] == "error: problems: 3, warnings: 0: see what to do above"
    assert "canary" not in done.stdout + done.stderr


@pytest.fixture
def no_name_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever asks what a name means waits."""
    released = threading.Event()

    def unanswered(*_: object, **__: object) -> None:
        released.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unanswered)
    yield
    released.set()


def test_hanging_checks_end(no_name_server: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"127.0.0.1:{silent.getsockname()[1]}"
        addresses = {"one": f"http://{place}", "two": f"http://{place}", "named": "http://some.name"}
        backends = [{"name": name, "base_url": url, "auth_token": "a-token"} for name, url in addresses.items()]
        names = {"DATABASE_URL": f"postgresql://u:{GOOD_PASSWORD}@{place}/d", "REDIS_URL": "redis://some.name/0"}
        names |= {"GATEWAY_BIND_HOST": "::", "GATEWAY_TRUSTED_PROXIES": "nginx-proxy"}
        began = time.monotonic()
        found = findings_of(settings_for(*backends, **names))
    assert time.monotonic() - began < 15
    assert matches(found["PostgreSQL"], "problem", "TimeoutError") and matches(found["Redis"], "problem", "Timeout")
    for name in ("one", "two", "named"):
        assert matches(found[f"backend {name}"], "problem", "", f"check its address ({addresses[name]})")
    assert found["listening"].state == "warning"


def test_a_check_that_fails_is_a_finding(examine: Examine, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Finding:
        raise RuntimeError("first line\nsecond")

    monkeypatch.setattr(doctor_settings, "workers", broken)
    found = examine(alpha)
    assert matches(found["settings"], "problem", "RuntimeError: first line") and found["PostgreSQL"].state == "ok"


def test_private_stores_that_fail_to_start(examine: Examine, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Iterator[Settings]:
        raise CommandFailed("no PostgreSQL here")

    monkeypatch.setattr(installation, "stores_of", failing)
    monkeypatch.setattr(installation, "read", lambda: settings_for(alpha, REDIS_URL=NO_REDIS))
    with report.stores_if_any() as settings:
        found = findings_of(settings)
    assert matches(found["PostgreSQL"], "problem", "no DATABASE_URL", "set DATABASE_URL") and matches(
        found["backend alpha"], "ok", "speaks ollama, openai"
    )


def test_warnings_only_are_not_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def checked(_: Settings) -> list[Finding]:
        return found

    monkeypatch.setattr(report, "check_all", checked)
    found = [doctor_finding.ok("a", "fine"), doctor_finding.warning("b", "odd", "change it")]
    asyncio.run(report.examine(settings_for(), argparse.Namespace(json=False)))
    assert capsys.readouterr().err == "problems: 0, warnings: 1\n"
    found.append(doctor_finding.problem("c", "bad", "mend it"))
    with pytest.raises(CommandFailed, match="problems: 1, warnings: 1"):
        asyncio.run(report.examine(settings_for(), argparse.Namespace(json=False)))


# ── settings ──


@pytest.mark.parametrize(
    ("line", "mode", "state"),
    [
        (f"POSTGRES_PASSWORD={GOOD_PASSWORD}", 0o644, "warning"),
        (f"POSTGRES_PASSWORD={GOOD_PASSWORD}", 0o640, "warning"),
        (f"POSTGRES_PASSWORD={GOOD_PASSWORD}", 0o600, "ok"),
        (f" DATABASE_URL = 'postgresql://u:{GOOD_PASSWORD}@h/d'", 0o644, "warning"),
        ("DATABASE_URL=postgresql://u@/d?host=/run", 0o644, "ok"),
        ("REDIS_URL=redis://redis:6379/0", 0o644, "ok"),
        ('OLLAMA_BACKENDS=[{"name":"a","base_url":"http://a","auth_token":"t"}]', 0o644, "warning"),
        ('OLLAMA_BACKENDS=[{"name":"a","base_url":"http://a"}]', 0o644, "ok"),
        ("OLLAMA_AUTH_TOKEN=t", 0o604, "warning"),
        ("# OLLAMA_AUTH_TOKEN=t\nPOSTGRES_PASSWORD=\nDEFAULT_RPM=7", 0o644, "ok"),
    ],
)
def test_an_env_file_that_others_can_read(folder: Path, line: str, mode: int, state: str) -> None:
    file = folder / ".env"
    file.write_text(f"# a comment\n{line}\n", encoding="utf-8")
    file.chmod(mode)
    found = doctor_settings.readers(file)
    assert matches(found, state, f"mode {mode:o}", "chmod 600 .env" if state == "warning" else "")
    assert GOOD_PASSWORD not in found.found


def test_the_env_file_of_the_current_folder_is_read(examine: Examine, folder: Path, alpha: FakeBackend) -> None:
    assert matches(examine(alpha)[".env"], "ok", "none")
    (folder / ".env").write_text("OLLAMA_AUTH_TOKEN=t\n")
    (folder / ".env").chmod(0o644)
    assert examine(alpha)[".env"].state == "warning"


def test_weak_passwords() -> None:
    found = doctor_settings.passwords(settings_for(DATABASE_URL="postgresql://u:postgres@h/d"))
    assert matches(found, "problem", "DATABASE_URL must carry a password", "set one of 12 or more characters")
    token = {"name": "a", "base_url": "http://a", "auth_token": "changeme"}
    found = doctor_settings.passwords(settings_for(token, DATABASE_URL=f"postgresql://u:{GOOD_PASSWORD}@h/d"))
    assert matches(found, "problem", "backend 'a' is a well-known default", "set another")
    assert doctor_settings.passwords(settings_for(DATABASE_URL="postgresql://u@/d?host=/run")).state == "ok"


@pytest.mark.parametrize(
    ("host", "proxies", "state", "expected"),
    [
        ("0.0.0.0", "127.0.0.1", "warning", "on 0.0.0.0:0, open to all"),
        ("::", "127.0.0.1,::1,localhost,no..such.name", "warning", "no proxy named"),
        ("0.0.0.0", "", "warning", "no proxy named"),
        ("0.0.0.0", "127.0.0.1,10.1.0.0/16", "ok", "proxies trusted: 10.1.0.0/16"),
        ("127.0.0.1", "", "ok", "this machine only"),
        ("::1", "", "ok", "this machine only"),
    ],
)
def test_plain_http_on_all_addresses(host: str, proxies: str, state: str, expected: str) -> None:
    settings = replace(settings_for(GATEWAY_BIND_HOST=host), gateway_trusted_proxies=tuple(filter(None, proxies.split(","))))
    assert matches(
        asyncio.run(doctor_settings.listening(settings)), state, expected, "plain HTTP" if state == "warning" else ""
    )


def test_the_local_run_listens_on_this_machine_only() -> None:
    settings = settings_for(GATEWAY_BIND_HOST="", GATEWAY_TRUSTED_PROXIES="127.0.0.1")
    assert asyncio.run(doctor_settings.listening(settings)).state == "warning"
    settings = replace(settings, sources={**settings.sources, "database_url": LOCAL_RUN})
    assert matches(asyncio.run(doctor_settings.listening(settings)), "ok", "on 127.0.0.1:0")


def test_large_numbers_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert doctor_settings.workers(settings_for(GATEWAY_WORKERS="2")).state == "ok"
    assert matches(
        doctor_settings.workers(settings_for(GATEWAY_WORKERS="3")), "warning", "3 on 2 cores", "GATEWAY_WORKERS to 2"
    )
    short = settings_for(MODEL_DISCOVERY_REFRESH_S="60", MODEL_DISCOVERY_CACHE_TTL_S="59")
    assert matches(doctor_settings.discovery(short), "warning", "every 60 s, kept for 59 s", "MODEL_DISCOVERY_CACHE_TTL_S")


@pytest.mark.parametrize(
    ("address", "token", "state"),
    [
        ("http://8.8.8.8:11434", "a-token", "problem"),
        ("http://[2001:4860:4860::8888]:11434", "a-token", "problem"),
        ("http://8.8.8.8:11434", "", "ok"),
        ("https://8.8.8.8", "a-token", "ok"),
        ("http://192.168.1.7:11434", "a-token", "ok"),
        ("http://100.64.0.7:11434", "a-token", "ok"),
        ("http://localhost:11434", "a-token", "ok"),
        ("http://no..such.name", "a-token", "ok"),
    ],
)
def test_tokens_sent_unencrypted(address: str, token: str, state: str) -> None:
    found = asyncio.run(doctor_settings.transport(BackendConfig("a", address, auth_token=token)))
    assert matches(found, state, "", "https://" if state == "problem" else "") and found.check == "transport to a"


# ── PostgreSQL ──


def test_a_schema_that_is_not_current(examine: Examine, empty_database: str, alpha: FakeBackend) -> None:
    found = examine(alpha, DATABASE_URL=empty_database)
    assert matches(found["PostgreSQL schema"], "problem", "not current", "`make migrate`")
    assert matches(found["PostgreSQL"], "ok", "answers in") and "keys" not in found
    private = asyncio.run(postgres.examine(empty_database, most_connections=1, migrates_itself=True))
    assert matches(private[-1], "warning", "not current", "migrate the private database")


def test_a_refusal_of_the_database_is_reported_with_its_reason(
    examine: Examine, stores: TestStores, alpha: FakeBackend
) -> None:
    found = examine(alpha, DATABASE_URL=stores.database_url.replace("/test_", "/there_is_no_"))
    assert matches(found["PostgreSQL"], "problem", 'InvalidCatalogNameError: database "there_is_no_')


def test_too_many_connections(examine: Examine, alpha: FakeBackend) -> None:
    found = examine(alpha, DATABASE_POOL_SIZE="300", GATEWAY_WORKERS="2")
    assert matches(found["PostgreSQL connections"], "warning", "uses up to 600", "max_connections")


def test_a_connection_limit_of_the_database(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    sql(stores.database_url, f"ALTER DATABASE {stores.database_url.split('/')[3].split('?')[0]} CONNECTION LIMIT 3")
    assert matches(examine(alpha)["PostgreSQL connections"], "warning", "3 available, one replica uses up to 4")


def test_missing_and_existing_months_of_the_audit(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    assert matches(examine(alpha)["audit months"], "warning", "missing: ", "make purge")
    sql(stores.database_url, "SELECT audit_make_partition(now() + make_interval(months => m)) FROM generate_series(0, 2) AS m")
    assert examine(alpha)["audit months"].state == "ok"


def test_a_database_user_that_may_not_create_tables(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    user = f"reader_{stores.database_url.split('/')[3].split('?')[0]}"
    sql(stores.database_url, f"CREATE ROLE {user} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {user}")
    url = stores.database_url.replace("gateway@", f"{user}@")
    try:
        found = examine(alpha, DATABASE_URL=url)
        assert matches(found["audit rights"], "problem", "may not create tables", "GRANT CREATE")
        sql(stores.database_url, f"GRANT CREATE ON SCHEMA public TO {user}")
        assert matches(examine(alpha, DATABASE_URL=url)["audit rights"], "problem", "does not own the table", "OWNER")
        sql(stores.database_url, f"REVOKE SELECT ON keys FROM {user}")
        assert matches(examine(alpha, DATABASE_URL=url)["keys"], "problem", "InsufficientPrivilegeError")
    finally:
        sql(stores.database_url, f"DROP OWNED BY {user}; DROP ROLE {user}")


def test_an_outdated_postgresql_server() -> None:
    found = postgres._version({"number": 130_011, "version": "13.11"})
    assert matches(found, "problem", "13.11", "PostgreSQL 14 or newer")


@pytest.mark.parametrize(
    ("ahead_s", "state", "expected"),
    [(0.3, "ok", "0.3 s ahead"), (-5, "warning", "5.0 s behind"), (31, "problem", "31.0 s ahead"), (-31, "problem", "behind")],
)
def test_clocks_that_differ(ahead_s: float, state: str, expected: str) -> None:
    assert matches(doctor_finding.clock("a clock", ahead_s), state, expected, "NTP" if state != "ok" else "")


# ── Redis ──


def test_a_redis_that_is_not_configured(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    assert matches(examine(alpha, REDIS_URL=NO_REDIS)["Redis"], "problem", "does not answer", "check REDIS_URL")
    for is_needed, state in ((True, "problem"), (False, "warning")):
        (found,) = asyncio.run(redis.examine(NO_REDIS, is_needed=is_needed))
        assert matches(found, state, "does not answer")


def test_audit_rows_that_pile_up_or_were_lost(
    examine: Examine, stores: TestStores, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis, "LONGEST_BACKLOG", 2)
    with stores.client() as client:
        for _ in range(2):
            client.xadd(BY_SHARD[1].rows, {"row": "{}"})
        assert matches(examine(alpha)["audit backlog"], "ok", "2 rows wait")
        client.xadd(BY_SHARD[7].rows, {"row": "{}"})
        client.set(BY_SHARD[3].dropped, 5)
    found = examine(alpha)
    assert matches(found["audit backlog"], "warning", "3 rows wait", "that a gateway runs")
    assert matches(found["audit losses"], "warning", "5 rows were dropped", "DEL nz:{3}:dropped")


def test_a_redis_that_evicts_or_refuses_writes(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    with stores.client() as client:
        usual: dict[str, Any] = client.config_get("maxmemory*")
        try:
            client.config_set("maxmemory-policy", "allkeys-lru")
            assert matches(examine(alpha)["Redis eviction"], "warning", "allkeys-lru", "noeviction")
            client.config_set("maxmemory-policy", "noeviction")
            client.config_set("maxmemory", 1)
            found = examine(alpha)
            assert matches(found["Redis writes"], "problem", "OutOfMemoryError", "make it accept writes")
            assert found["Redis"].state == found["Redis eviction"].state == "ok"
        finally:
            client.config_set("maxmemory", usual["maxmemory"])
            client.config_set("maxmemory-policy", usual["maxmemory-policy"])


def test_a_redis_user_with_few_permissions(examine: Examine, stores: TestStores, alpha: FakeBackend) -> None:
    with stores.client() as client:
        client.acl_setuser("little", enabled=True, nopass=True, keys=["*"], commands=["+ping", "+set", "+client", "+hello"])
        try:
            found = examine(alpha, REDIS_URL=stores.redis_url.replace("unix://", "unix://little:x@"))
        finally:
            client.acl_deluser("little")
    assert matches(found["Redis facts"], "problem", "NoPermissionError", "that the user") and found["Redis"].state == "ok"
    assert found["audit backlog"].state == "problem"


@pytest.mark.parametrize(
    ("version", "state"), [("6.0.16", "problem"), ("5", "problem"), ("unknown", "problem"), ("6.2.0", "ok"), (7.4, "ok")]
)
def test_redis_versions(version: object, state: str) -> None:
    found = redis.version({"redis_version": version})
    assert matches(found, state, str(version), "6.2" if state == "problem" else "")


def test_the_version_of_valkey_is_shown() -> None:
    found = redis.version({"redis_version": "7.2.4", "valkey_version": "9.1.2"})
    assert found == doctor_finding.ok("Redis version", "7.2.4 (Valkey 9.1.2)")


def test_a_redis_without_persistence() -> None:
    assert matches(redis.persistence({"aof_enabled": 0}), "warning", "no append-only file", "appendonly")
    assert redis.persistence({"aof_enabled": 1}).state == "ok"


# ── backends and the rest ──


def test_backends_that_cannot_be_used(examine: Examine, alpha: FakeBackend, beta: FakeBackend) -> None:
    alpha.stop()
    beta.play("/api/chat", answer(401, {"error": "unauthorized"}))
    found = examine(alpha, entry_of(beta, auth_token="stale-token"))
    assert matches(found["backend alpha"], "problem", "ConnectionRefused", f"check its address ({alpha.url})")
    assert matches(found["backend beta"], "problem", "its token is refused", "OLLAMA_AUTH_TOKEN")
    assert matches(examine(beta)["backend beta"], "problem", "its token is missing")


def test_aliases_that_lead_to_nothing(examine: Examine, alpha: FakeBackend) -> None:
    assert "aliases" not in examine(alpha)
    found = examine(alpha, MODEL_ALIASES='{"mini": ["missing", "llama3.2"], "claude-*": "missing", "gone": "missing"}')
    assert matches(found["aliases"], "ok", "1 of 3 lead to a model")
    for name in ("claude-*", "gone"):
        assert matches(found[f"alias {name}"], "warning", "leads to nothing: missing:latest", "`make models` lists all")
    assert "alias mini" not in found
    alpha.stop()
    time.sleep(0.3)
    gone = examine(alpha, MODEL_ALIASES='{"mini": "llama3.2"}', MODEL_DISCOVERY_CACHE_TTL_S="0.2")
    assert matches(gone["alias mini"], "warning", "leads to nothing")


def test_slots_that_ollama_does_not_use(examine: Examine, alpha: FakeBackend, beta: FakeBackend) -> None:
    entry = {"name": "qwen3-vl:8b", "details": {"family": "qwen3vl"}}
    for backend in (alpha, beta):
        backend.play("/api/tags", answer(200, {"models": [entry, {"name": "llama3.2"}]}))
    found = examine(entry_of(alpha, slots=4), entry_of(beta, slots=4, models={"QWEN3-vl:8b": {"slots": 1}}))
    assert matches(found["slots of alpha"], "warning", "one call at a time with qwen3-vl:8b", '"slots": 1')
    assert "slots of beta" not in found
    assert "slots of alpha" not in examine(alpha, OLLAMA_SLOTS="0")


def test_slots_that_ollama_may_have_while_calls_wait(
    examine: Examine, stores: TestStores, alpha: FakeBackend, beta: FakeBackend
) -> None:
    of_alpha = [row(ago(0.1), answered_as="Llama3.2", queue_position=number % 2) for number in range(30)]
    of_beta = [row(ago(0.1), backend="beta", queue_position=3) for _ in range(30)]
    yesterday = [row(ago(1.1), backend="beta", queue_position=3) for _ in range(30)]
    write(stores.database_url, of_alpha + yesterday)
    found = examine(alpha, beta, OLLAMA_SLOTS="0")
    words = "15 of 30 calls of the last day waited for a slot of llama3.2:latest, taken to have one"
    assert matches(found["waits for alpha"], "warning", words, "OLLAMA_NUM_PARALLEL") and "waits for beta" not in found
    write(stores.database_url, of_beta)
    found = examine(entry_of(alpha, slots=1), beta, OLLAMA_SLOTS="0")
    assert "waits for beta" in found and "waits for alpha" not in found, "that number is the operator's"
    assert "waits for alpha" not in examine(alpha, beta, OLLAMA_SLOTS="4")


@pytest.mark.parametrize(
    ("routing", "tiers", "state", "words"),
    [
        ("order", (1, 2), "ok", "order; 2 tiers of 2 backends"),
        ("warm", (1, 2), "ok", "warm; 2 tiers of 2 backends"),
        ("fast", (1, 1), "ok", "fast; 1 tier of 2 backends"),
        ("fast", (1,), "ok", "fast; 1 tier of 1 backends"),
        ("fast", (1, 2), "warning", "there is nothing to choose"),
    ],
)
def test_a_rule_that_has_nothing_to_choose(routing: str, tiers: tuple[int, ...], state: str, words: str) -> None:
    entries = [{"name": f"b{n}", "base_url": f"http://h{n}", "tier": tier} for n, tier in enumerate(tiers)]
    found = doctor_settings.routing(settings_for(*entries, ROUTING=routing))
    assert matches(found, state, words, '"tier"' if state == "warning" else "")


def test_copies_that_differ(examine: Examine, alpha: FakeBackend, beta: FakeBackend) -> None:
    for backend, digest in ((alpha, "a" * 64), (beta, "b" * 64)):
        backend.play("/api/tags", answer(200, {"models": [{"name": "llama3.2", "digest": digest}]}))
    for parity in ("warn", "distinct"):
        finding = examine(alpha, beta, DIGEST_PARITY=parity)["model llama3.2:latest"]
        assert matches(finding, "warning", "aaaaaaaaaaaa on alpha, bbbbbbbbbbbb on beta", "pull it again on all backends")


def test_backend_entries_with_the_wrong_kind_or_path(examine: Examine, alpha: FakeBackend) -> None:
    untold, silent, talkative = (FakeBackend("openai", name=name) for name in ("untold", "silent", "talkative"))
    with untold, silent, talkative:
        silent.play("/v1/models", answer(404, {"error": "not found"}))
        talkative.play("/api/tags", answer(200, {"error": "Unexpected endpoint or method. (GET /api/tags)"}))
        found = examine(
            {**entry_of(alpha), "base_url": f"{alpha.url}/v1"},
            {**entry_of(untold), "name": "gamma", "base_url": f"{untold.url}/v1/"},
            {**entry_of(untold), "kind": "ollama"},
            {**entry_of(silent), "kind": "ollama"},
            {**entry_of(talkative), "kind": "ollama"},
        )
    for name in ("alpha", "gamma"):
        assert matches(found[f"backend {name}"], "problem", "status 404; leave off /v1", "leave off /v1 at the end")
    assert matches(found["backend untold"], "problem", "status 404; it is OpenAI-compatible", 'add "kind":"openai"')
    assert matches(found["backend silent"], "problem", "status 404; is it OpenAI-compatible?", 'add "kind":"openai"')
    assert matches(found["backend talkative"], "problem", "/api/tags is not a list of models; it is", 'add "kind":"openai"')


def test_a_backend_that_refuses_may_listen_on_its_own_machine_only(examine: Examine, alpha: FakeBackend) -> None:
    alpha.stop()
    found = examine(alpha, {"name": "nowhere", "base_url": "http://nowhere.invalid:11434"})
    for name in ("alpha", "nowhere"):
        assert matches(found[f"backend {name}"], "problem", "unreachable", "unless it has OLLAMA_HOST=0.0.0.0")


def test_a_backend_without_models_and_a_slow_one(
    examine: Examine, alpha: FakeBackend, beta: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    alpha.models.clear()
    monkeypatch.setattr(report, "SLOW_MS", 0)
    found = examine(alpha, beta)
    assert matches(found["backend alpha"], "warning", "0 models", "give it a model")
    assert matches(found["backend beta"], "warning", "1 models in", "closer")


def test_a_missing_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report.accelerators().state == report.python().state == "ok"
    monkeypatch.setattr(serve, "missing_accelerators", lambda: ["uvloop"])
    assert matches(report.accelerators(), "warning", "missing: uvloop", "pinned requirements")


def test_make_doctor_calls_it() -> None:
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert "\ndoctor: .venv/ready-to-run ## " in makefile and "\t@$(GATEWAY) doctor $(JSON_FLAG)\n" in makefile
