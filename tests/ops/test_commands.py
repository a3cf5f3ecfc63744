"""The operator's commands as operators type them: `python -m gateway VERB` and the `make` targets that call it."""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.auth import key_format
from tests.conftest import StartGateway, TestStores
from tests.stores.test_database_errors import become_standby, run_sql
from tests.support import fork_server
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of, environment_for
from tests.support.processes import environment, free_port, until
from tests.support.project import PROJECT
from tests.support.running_gateway import RunningGateway

Done = subprocess.CompletedProcess[str]
CANARY = "canary-5e1b22"


class Operator:
    """Types commands in a folder of its own, against the test's stores and backends."""

    def __init__(self, folder: Path, stores: TestStores) -> None:
        self.folder = folder
        self.names = environment_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)

    def types(self, *words: str, **names: str) -> Done:
        done = fork_server.gateway().run("gateway", words, self.folder, environment({**self.names, **names}))
        assert "Traceback" not in done.stderr + done.stdout
        return done

    def gets(self, *words: str, **names: str) -> str:
        done = self.types(*words, **names)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def gets_json(self, *words: str, **names: str) -> "JsonValue":
        return JsonValue(json.loads(self.gets(*words, "--json", **names)))

    def is_refused(self, *words: str, code: int = 1, **names: str) -> str:
        done = self.types(*words, **names)
        assert (done.returncode, done.stdout) == (code, "")
        return done.stderr

    def with_backends(self, *backends: FakeBackend, **more: str) -> None:
        self.names["OLLAMA_BACKENDS"] = json.dumps([entry_of(backend, **more) for backend in backends])


class JsonValue:
    """What a command printed for machines."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __getitem__(self, key: str | int) -> object:
        assert isinstance(self.value, dict | list)
        return self.value[key]  # type: ignore[index]

    @property
    def rows(self) -> list[dict[str, object]]:
        assert isinstance(self.value, list)
        return self.value


@pytest.fixture
def operator(tmp_path: Path, stores: TestStores) -> Operator:
    return Operator(tmp_path, stores)


def opens(gateway: RunningGateway, key: str) -> bool:
    return httpx.get(f"{gateway.url}/api/tags", headers={"x-api-key": key}, timeout=20).status_code == 200


# ── keys ──


def test_the_last_line_is_the_key_only(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    done = operator.types("key", "--name", "first")
    assert done.returncode == 0
    assert key_format.parse(done.stdout.removesuffix("\n")) is not None, "nothing else is on standard output"
    assert "shown only once" in done.stderr
    assert opens(start_gateway(alpha), done.stdout.strip())


def test_a_key_with_all_its_rights(operator: Operator) -> None:
    limits = ("--rpm", "5", "--tpm", "6", "--concurrent", "0")
    made = operator.gets_json("key", "--name", "all", "--models", "a, b*", "--expires", "30d", *limits, "--admin-models")
    assert made["name"] == "all" and key_format.parse(str(made["key"]))
    (row,) = operator.gets_json("keys").rows
    assert row["id"] == made["id"] and row["models"] == ["a", "b*"] and row["flags"] == ["admin_models"]
    assert (row["rpm"], row["tpm"], row["concurrent"], row["state"], row["secrets"]) == (5, 6, 0, "active", 1)
    assert row["expires_at"] and str(made["key"]) not in json.dumps(row)


def test_keys_are_listed_for_people(operator: Operator) -> None:
    assert "no keys yet: `make key NAME=…`" in operator.gets("keys")
    operator.gets("key", "--name", "first")
    operator.gets("key", "--name", "second", "--models", "llama*")
    operator.gets("revoke", "--key", "first")
    head, second, first = operator.gets("keys").splitlines()
    assert head.startswith("ID") and "LAST USED AT" in head
    assert "second" in second and "llama*" in second and "active" in second
    assert "first" in first and "(all)" in first and "revoked" in first


def test_rotation(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    first = operator.gets("key", "--name", "mine").strip()
    second = operator.gets("rotate", "--key", "mine").splitlines()[-1]
    assert opens(gateway, first) and opens(gateway, second), "both work for a day"
    third = operator.gets_json("rotate", "--key", first.split("_")[1], "--overlap", "0")
    until(lambda: not opens(gateway, first) and not opens(gateway, second), 1)
    assert opens(gateway, str(third["key"])) and third["id"] == first.split("_")[1]


def test_revocation_by_name_and_by_id(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    by_name, by_id = (operator.gets("key", "--name", name).strip() for name in ("one", "two"))
    assert opens(gateway, by_name) and opens(gateway, by_id)
    assert "at once" in operator.gets("revoke", "--key", "one")
    assert operator.gets_json("revoke", "--key", by_id.split("_")[1])["everywhere"] == "at once"
    until(lambda: not opens(gateway, by_name) and not opens(gateway, by_id), 1)


def test_revocation_without_redis_shows_when_it_takes_effect(operator: Operator) -> None:
    operator.gets("key", "--name", "mine", REDIS_URL="unix:///nowhere/redis.sock")
    printed = operator.gets("revoke", "--key", "mine", REDIS_URL="unix:///nowhere/redis.sock", REDIS_KEY_CACHE_TTL_S="7")
    assert "within 7 s (Redis did not answer)" in printed


def test_a_name_used_twice_and_an_unknown_key(operator: Operator) -> None:
    operator.gets("key", "--name", "mine")
    assert "choose another name, or rotate or revoke it" in operator.is_refused("key", "--name", "mine")
    assert operator.is_refused("revoke", "--key", "nobody") == "error: there is no active key 'nobody': see `make keys`\n"
    assert "see `make keys`" in operator.is_refused("rotate", "--key", "nobody")


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["key"], "--name"),
        (["key", "--name", "a", "--expires", "soon"], "write 90s, 15m, 24h, 30d or 2w"),
        (["key", "--name", "a", "--expires", "0"], "a key must be valid for some time"),
        (["key", "--name", "a", "--expires", "999999w"], "at most 36500d"),
        (["key", "--name", "a", "--rpm", "-1"], "rpm"),
        (["key", "--name", "a", "--tpm", "100k"], "write a whole number"),
        (["rotate", "--key", "a", "--overlap", "-1h"], "overlap"),
        (["rotate"], "--key"),
        (["revoke", "name"], "--key"),
        (["frobnicate"], "invalid choice"),
        ([], "VERB"),
    ],
)
def test_arguments_that_cannot_be_read(operator: Operator, words: list[str], advice: str) -> None:
    assert advice in operator.is_refused(*words, code=2)


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\tb", "a\udcffb"])
def test_names_that_cannot_be_read(operator: Operator, name: str) -> None:
    assert "choose another name" in operator.is_refused("key", "--name", name)


# ── backends ──


@pytest.fixture
def gamma() -> Iterator[FakeBackend]:
    with FakeBackend("openai", ["gamma-7b"], name="gamma", token=CANARY) as backend:
        yield backend


def test_models_by_backend(operator: Operator, alpha: FakeBackend, beta: FakeBackend) -> None:
    beta.models.append("only-beta:7b")
    operator.with_backends(alpha, beta)
    printed = operator.gets("models")
    rows = [line.split()[:2] for line in printed.splitlines()[1:4]]
    assert rows == [["alpha", "llama3.2:latest"], ["beta", "llama3.2:latest"], ["beta", "only-beta:7b"]]
    assert printed.splitlines()[-1].startswith("2 different models; ")
    facts = operator.gets_json("models")
    assert facts["models"] == 2


def test_models_shows_the_age_of_the_map(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    start_gateway(alpha)
    operator.with_backends(alpha)
    facts = operator.gets_json("models")
    age, size = facts["map_age_s"], facts["map_bytes"]
    assert isinstance(age, float) and 0 <= age < 20 and isinstance(size, int) and size > 20


def test_no_models(operator: Operator, alpha: FakeBackend) -> None:
    alpha.stop()
    operator.with_backends(alpha)
    assert "no backend has a model (see `make probe`)" in operator.gets("models")


def test_refresh_reaches_a_running_gateway_at_once(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="600")
    operator.with_backends(alpha)
    alpha.models.append("new:latest")
    assert "new:latest" not in gateway.components.discovery.catalog.models
    assert operator.gets_json("refresh").rows == [{"backend": "alpha", "models": 2, "state": "up"}]
    until(lambda: "new:latest" in gateway.components.discovery.catalog.models, 1)


def test_refresh_without_redis_is_reported(operator: Operator, alpha: FakeBackend) -> None:
    operator.with_backends(alpha)
    done = operator.types("refresh", REDIS_URL="unix:///nowhere/redis.sock")
    assert done.returncode == 0 and "running gateways refresh on their own schedule" in done.stderr


def test_probe_of_healthy_backends(operator: Operator, alpha: FakeBackend, gamma: FakeBackend) -> None:
    operator.names["OLLAMA_BACKENDS"] = json.dumps([entry_of(alpha), entry_of(gamma, auth_token=CANARY)])
    first, second = operator.gets_json("probe").rows
    assert first | {"latency_ms": 0} == {
        "backend": "alpha",
        "kind": "ollama",
        "address": alpha.url,
        "reachable": True,
        "latency_ms": 0,
        "version": "0.12.6",
        "models": 1,
        "token": "none needed",
        "problem": None,
    }
    assert isinstance(first["latency_ms"], float) and first["latency_ms"] > 0
    assert (second["token"], second["models"], second["problem"]) == ("accepted", 1, None)
    assert CANARY not in operator.gets("probe")
    assert not [call for backend in (alpha, gamma) for call in backend.requests if call.body and b"messages" in call.body]


@pytest.mark.parametrize("token", ["", "stale-token"])
def test_probe_of_a_token_that_is_refused(operator: Operator, gamma: FakeBackend, token: str) -> None:
    operator.with_backends(gamma, auth_token=token)
    done = operator.types("probe", "--json")
    (row,) = json.loads(done.stdout)
    assert done.returncode == 1 and "some backends cannot be used" in done.stderr
    assert row["reachable"] is True and row["token"] == ("REFUSED" if token else "MISSING") and row["problem"]


def test_probe_of_a_list_that_anybody_may_see_but_calls_that_need_a_token(operator: Operator, alpha: FakeBackend) -> None:
    alpha.play("/api/chat", answer(401, {"error": "unauthorized"}))
    operator.with_backends(alpha, auth_token="stale-token")
    done = operator.types("probe", "--json")
    (row,) = json.loads(done.stdout)
    assert (done.returncode, row["reachable"], row["token"]) == (1, True, "REFUSED")


def test_probe_of_a_backend_that_is_down(operator: Operator, alpha: FakeBackend, beta: FakeBackend) -> None:
    beta.stop()
    operator.with_backends(alpha, beta)
    done = operator.types("probe")
    assert done.returncode == 1 and "see their problems above" in done.stderr
    _, first, second = done.stdout.splitlines()
    assert "yes" in first and " no " in second and "ConnectionRefused" in second


# ── the database ──


def test_migrate(operator: Operator, empty_database: str) -> None:
    operator.names["DATABASE_URL"] = empty_database
    assert "run `make migrate`" in operator.is_refused("keys")
    done = operator.types("migrate")
    assert done.returncode == 0 and "applying 0001_keys" in done.stderr
    assert operator.gets_json("migrate")["applied"] == 0
    assert operator.gets("keys").startswith("no keys yet")


AWAY = "error: PostgreSQL does not answer: check DATABASE_URL and that the server runs\n"


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


# ── the rest ──


def test_config_shows_values_and_their_sources(operator: Operator) -> None:
    (operator.folder / ".env").write_text("MAX_REQUEST_BODY_BYTES=70000\n")
    (operator.folder / "token").write_text(CANARY)
    names = {"DATABASE_URL": f"postgresql://u:{CANARY}@h/d", "REDIS_URL": f"redis://:{CANARY}@h/0"}
    names |= {"OLLAMA_AUTH_TOKEN_FILE": str(operator.folder / "token")}
    printed, rows = operator.gets("config", **names), operator.gets_json("config", **names).rows
    found = {row["name"]: (row["value"], row["from"]) for row in rows}
    assert found["MAX_REQUEST_BODY_BYTES"] == ("70000", ".env") and found["MAX_NUM_PREDICT"] == ("4096", "default")
    assert found["DATABASE_URL"] == ("postgresql://u:***@h/d", "environment")
    assert found["OLLAMA_AUTH_TOKEN"] == ("***", "OLLAMA_AUTH_TOKEN_FILE")
    assert CANARY not in printed + json.dumps(rows) and len(printed.splitlines()) == len(rows) + 1


def test_health_of_a_gateway_ignores_proxies_in_the_environment(
    operator: Operator, start_gateway: StartGateway, alpha: FakeBackend
) -> None:
    port = start_gateway(alpha).url.rpartition(":")[2]
    for host in ("127.0.0.1", "0.0.0.0", "::"):
        assert operator.gets("health", GATEWAY_BIND_PORT=port, GATEWAY_BIND_HOST=host, http_proxy="http://127.0.0.1:1") == ""


def test_health_without_a_gateway(operator: Operator) -> None:
    assert "no gateway answers at http://127.0.0.1:" in operator.is_refused("health", GATEWAY_BIND_PORT=str(free_port()))
    assert "no gateway answers at http://[::1]:" in operator.is_refused(
        "health", GATEWAY_BIND_PORT="1", GATEWAY_BIND_HOST="::1"
    )


@pytest.mark.parametrize("words", [["keys"], ["config"], ["probe"], ["psql"], ["health"], ["serve"]])
def test_a_wrong_setting_stops_every_command(operator: Operator, words: list[str]) -> None:
    line = operator.is_refused(*words, code=2, DEFAULT_RPM="many")
    assert line == "error: DEFAULT_RPM must be an integer from 0 to 1000000000, not 'many'\n"


def test_a_reader_that_leaves_early_is_no_error(operator: Operator) -> None:
    command = f"{sys.executable} -m gateway config | head -0"
    done = subprocess.run(
        command, shell=True, cwd=operator.folder, env=environment(operator.names), capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


# ── make ──

PRINT = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder whose environment is ready, so that `make` only calls the command."""
    shutil.copy(PROJECT / "Makefile", tmp_path)
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "requirements-local.txt").touch()
    (tmp_path / ".venv").mkdir()
    for marker in ("made", "ready-to-run"):
        (tmp_path / ".venv" / marker).touch()
    (tmp_path / "print.py").write_text(PRINT)
    return tmp_path


def make(folder: Path, *words: str, **names: str) -> list[str]:
    """What `python -m gateway` is called with."""
    command = ["make", "-s", *words, f"GATEWAY={sys.executable} print.py"]
    done = subprocess.run(command, cwd=folder, env=environment(names), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


# As pip is: it tells of every package, with -q of warnings and errors alone.
PIP = """#!/bin/sh
case "$*" in
    *--version*) ;;
    *" -q "*) if [ -e no-room ]; then echo "ERROR: no room" >&2; exit 1; fi ;;
    *) seq 40 ;;
esac
"""


def test_make_installs_in_one_line_and_errors_are_seen(made: Path) -> None:
    (made / "bin").mkdir()
    (made / "bin" / "python").write_text(PIP)
    (made / "bin" / "python").chmod(0o755)
    (made / ".venv" / "ready-to-run").unlink()
    command = ["make", "keys", "BIN=bin", f"GATEWAY={sys.executable} print.py"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=made, env=environment({}), capture_output=True, text=True, timeout=30, check=False)

    (made / "no-room").touch()
    failed = run()
    assert failed.returncode != 0 and "ERROR: no room" in failed.stderr
    (made / "no-room").unlink()
    first, second = run(), run()
    assert first.stdout.splitlines() == ["installing the pinned dependencies (a minute, the first time)", '["keys"]']
    assert (first.stderr, second.stdout) == ("", '["keys"]\n')


@pytest.mark.parametrize(
    "name",
    ["plain", "two words", 'a b"c', "it's", "`id`", "a;id", "a|id>x", "\\n", "*", "ünï", "--rpm", "a#b", "", "%s", "~", "a\\"],
)
def test_make_passes_names_on_as_they_are(made: Path, name: str) -> None:
    assert make(made, "key", f"NAME={name}") == (["key", "--name", name] if name else ["key"])


def test_make_passes_dollar_signs_on(made: Path) -> None:
    # As in every makefile, a dollar is written twice.
    assert make(made, "key", 'NAME=a b"c$$d') == ["key", "--name", 'a b"c$d']
    assert make(made, "key", "NAME=$$(id)") == ["key", "--name", "$(id)"]
    assert make(made, "key", "NAME=$${HOME}") == ["key", "--name", "${HOME}"]


def test_make_passes_everything_on(made: Path) -> None:
    words = [
        "NAME=n",
        "MODELS=a b*",
        "EXPIRES=30d",
        "RPM=1",
        "TPM=2",
        "CONCURRENT=3",
        "ADMIN_MODELS=1",
        "SHOW_BACKEND=1",
        "JSON=1",
    ]
    assert make(made, "key", *words) == [
        *("key", "--name", "n", "--models", "a b*", "--expires", "30d", "--rpm", "1", "--tpm", "2", "--concurrent", "3"),
        *("--admin-models", "--show-backend", "--json"),
    ]
    assert make(made, "rotate", "KEY=my key", "OVERLAP=1h") == ["rotate", "--key", "my key", "--overlap", "1h"]
    assert make(made, "revoke", "KEY=my key") == ["revoke", "--key", "my key"]
    assert make(made, "keys", "JSON=0") == ["keys"]


def test_make_passes_on_what_is_asked_of_the_audit(made: Path) -> None:
    filters = ["KEY=a b", "MODEL=a*", "SINCE=7d", "STATUS=4xx", "OUTCOME=refused", "LIMIT=5", "CSV=1"]
    assert make(made, "audit", *filters) == [
        *("audit", "--key", "a b", "--model", "a*", "--since", "7d", "--status", "4xx", "--outcome", "refused", "--limit", "5"),
        "--csv",
    ]
    assert make(made, "usage", "BY=day,key", "SINCE=1d", "JSON=1") == ["usage", "--by", "day,key", "--since", "1d", "--json"]
    assert make(made, "forget", "KEY=a") == ["forget", "--key", "a"]


def test_make_variables_are_not_taken_from_the_environment(made: Path) -> None:
    names = {"NAME": "of the machine", "MODELS": "x", "JSON": "1", "ADMIN_MODELS": "1", "RPM": "1"}
    assert make(made, "key", "NAME=mine", **names) == ["key", "--name", "mine"]
    assert make(made, "key", **names) == ["key"]
    assert make(made, "revoke", KEY="of the environment") == ["revoke"]


@pytest.mark.parametrize(
    "verb", ["keys", "models", "refresh", "probe", "audit", "usage", "audit-verify", "purge", "migrate", "config", "psql"]
)
def test_each_target_calls_its_verb(made: Path, verb: str) -> None:
    assert make(made, verb) == [verb]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_output_that_cannot_be_written_is_reported() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "config", "--json"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1 and b"cannot be written" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [["key", "NAME=a"], ["limit", "KEY=a"]])
def test_make_refuses_variables_that_it_does_not_know(verb: list[str]) -> None:
    def said_to(given: str) -> Done:
        # Without what the `make` that runs the tests was given.
        names = environment({})
        return subprocess.run(
            ["make", "-n", *verb, given], cwd=PROJECT, env=names, capture_output=True, text=True, timeout=30, check=False
        )

    wrong, right = said_to("RPMS=5"), said_to("RPM=5")
    assert wrong.returncode and "takes no RPMS" in wrong.stderr and right.returncode == 0 and "--rpm" in right.stdout
