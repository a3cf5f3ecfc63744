"""What would become of a call, and what became of one: said before as it then happens, and told after as it was."""

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway import endpoints
from gateway.admin import explain
from gateway.admin.explain import Question
from gateway.auth.key import ADMIN, Key, unpack
from gateway.components import default_quota
from gateway.dialects import registry
from gateway.dialects.dialect import Operation
from gateway.fleet.backends.circuit_breaker import FAILURES_UNTIL_OPEN, CircuitBreaker
from gateway.fleet.ways import CHATS
from gateway.ops.cli import explain as cli_explain
from gateway.stores.redis_client import RedisUnavailable
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import sql
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of, environment_for
from tests.support.processes import operate, serving, until
from tests.support.running_gateway import RunningGateway

STATES = 300
FEW = 4
PATHS = tuple(CHATS.values())
MODELS = ("llama3.2:latest", "llama3.2", "qwen3:8b", "only-openai", "nobody-has-it", "llama-mini", "claude-x", "dead")
ALIASES = '{"llama-mini": ["qwen3:8b", "llama3.2"], "claude-*": ["only-openai", "qwen3:8b"], "dead": "nobody-has-it"}'
MESSAGES = [{"role": "user", "content": "Say hello."}]
# An ordinary call of each route, with a limit of seven tokens.
LIMITED: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 7}},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 7},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 7},
    "/v1/responses": {"input": "Say hello.", "max_output_tokens": 7},
}
BODY = {"model": "llama3.2", "messages": MESSAGES, "stream": False}
RIGHTS: tuple[dict[str, Any], ...] = (
    {},
    {"models": ("llama*",)},
    {"models": ("qwen3:8b", "nobody-has-it")},
    {"rpm": 0},
    {"rpm": 1},
    {"tpm": 5},
    {"tpm": 200, "month": 150},
    {"tpm": 100_000, "day": 100_000},
    {"day": 1},
    {"month": 0},
    {"concurrent": 0},
    {"concurrent": 1},
)


@pytest.fixture
def fleet() -> Iterator[list[FakeBackend]]:
    with (
        FakeBackend(models=["llama3.2:latest", "qwen3:8b"], name="alpha") as alpha,
        FakeBackend(models=["llama3.2:latest"], name="beta", is_native=True) as beta,
        FakeBackend(models=["llama3.2:latest", "only-openai"], name="gamma", kind="openai") as gamma,
    ):
        yield [alpha, beta, gamma]


def operation_of(path: str) -> Operation:
    return next(found for dialect in registry.dialects().values() for found in dialect.operations if found.path == path)


def rights_of(gateway: RunningGateway, whole: str) -> Key:
    """The key's rights as they are, looked up as the gateway does it."""
    row = gateway.call(gateway.components.database.row("key_with_rights", whole.split("_")[1]))
    assert row is not None

    return unpack(dict(row))


def breaker_in(state: str) -> CircuitBreaker:
    now = [100.0]
    breaker = CircuitBreaker(lambda: now[0])
    if state != "closed":
        for _ in range(FAILURES_UNTIL_OPEN):
            breaker.failed()
    if state == "half-open":
        now[0] += 1000
    assert breaker.state == state
    return breaker


@contextmanager
def in_some_state(gateway: RunningGateway, chance: random.Random) -> Iterator[None]:
    """Breakers, drains and connections in use, by chance; all as before at the end."""
    taken = {}
    for name, backend in gateway.components.backends.items():
        backend.breaker = breaker_in(chance.choice(("closed", "closed", "open", "half-open")))
        backend.is_drained = chance.random() < 0.2
        taken[name] = backend.config.max_connections if chance.random() < 0.2 else 0
        backend.in_flight += taken[name]
    try:
        yield
    finally:
        for name, backend in gateway.components.backends.items():
            backend.in_flight -= taken[name]
            backend.is_drained = False


def test_the_explanation_matches_what_happens_next(start_gateway: StartGateway, fleet: list[FakeBackend]) -> None:
    gateway = start_gateway(*(entry_of(backend, max_connections=FEW) for backend in fleet), MODEL_ALIASES=ALIASES)
    chance = random.Random(20)
    known = []
    for number, rights in enumerate(RIGHTS):
        models = rights.get("models", ())
        limits = {name: value for name, value in rights.items() if name != "models"}
        known.append(gateway.key(*models, name=f"key {number}", flags=("show_backend",), **limits))
    met: Counter[tuple[int, str]] = Counter()
    ways: Counter[tuple[str, bool]] = Counter()
    for _ in range(STATES):
        whole, path, model = chance.choice(known), chance.choice(PATHS), chance.choice(MODELS)
        body = {"model": model, **LIMITED[path], "stream": False}
        operation = operation_of(path)
        assert operation.need is not None
        need = operation.need(body)
        question = Question(rights_of(gateway, whole), model, operation, need.prompt, need.output)
        with in_some_state(gateway, chance):
            settings, components = gateway.settings, gateway.components
            seen, defaults = endpoints.fleet_as_seen(components), default_quota(settings)
            explained = gateway.call(explain.explain(question, seen, components.limits, defaults, settings.max_num_predict))
            with gateway.http(whole) as client:
                happened = client.post(path, json=body)
        found = (happened.status_code, happened.headers.get("x-gateway-backend", ""))
        assert (explained["status"], explained["backend"]) == found, json.dumps(explained, indent=1)
        if happened.status_code != 200:
            error = happened.json()["error"]
            assert isinstance(error, str) or error.get("code", explained["outcome"]) == explained["outcome"]
        else:
            [row] = [row for row in explained["backends"] if row["order"] == 1]
            assert (row["translated_to"] or "") == happened.headers.get("x-gateway-translated-to", ""), row
            ways[path, bool(row["translated_to"])] += 1
        met[found] += 1
        gateway.wait_idle()
    statuses = Counter(status for status, _ in met.elements())
    assert set(statuses) == {200, 403, 429, 503}, met
    assert {backend for _, backend in met} == {"", "alpha", "beta", "gamma"}
    either = {(path, is_translated) for path in PATHS for is_translated in (False, True)}
    assert ways.keys() == either - {("/v1/chat/completions", True)}


@pytest.mark.parametrize("path", [*registry.operations(registry.dialects())])
def test_every_route_is_explained(start_gateway: StartGateway, path: str) -> None:
    """Also where a server has the route: it may not take what is of another API."""
    with (
        FakeBackend(models=["x"], name="old") as old,
        FakeBackend(models=["x"], name="native", is_native=True) as native,
        FakeBackend("openai", ["x"], name="llama", is_native=True) as llama,
    ):
        gateway = start_gateway(old, native, llama)
        question = Question(rights_of(gateway, gateway.key()), "x", operation_of(path))
        fleet, defaults = endpoints.fleet_as_seen(gateway.components), default_quota(gateway.settings)
        explained = gateway.call(explain.explain(question, fleet, gateway.components.limits, defaults, 4096))
        assert (explained["status"], explained["route"]) in ((200, path), (400, path))
        if path in CHATS.values():
            ways = [row["translated_to"] for row in explained["backends"]]
            to = "/v1/chat/completions"
            assert (
                ways
                == {
                    "/api/chat": [None, None, to],
                    "/v1/chat/completions": [None, None, None],
                    "/v1/messages": [to, None, None],
                    "/v1/responses": [to, None, to],
                }[path]
            )


def test_explaining_counts_towards_no_limit(start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores) -> None:
    gateway = start_gateway(alpha)
    whole = gateway.key(rpm=3, concurrent=1, day=1000)
    question = Question(rights_of(gateway, whole), "llama3.2", operation_of("/api/chat"), 10, 10)
    fleet, defaults = endpoints.fleet_as_seen(gateway.components), default_quota(gateway.settings)
    for _ in range(10):
        explained = gateway.call(explain.explain(question, fleet, gateway.components.limits, defaults, 4096))
        assert (explained["status"], explained["backend"]) == (200, "alpha")
    assert {line["limit"]: line["used"] for line in explained["limits"]} == {
        "rpm": 0,
        "tpm": 0,
        "concurrent": 0,
        "day": 0,
    }
    with gateway.http(whole) as client:
        for _ in range(3):
            assert (
                client.post("/api/chat", json={"model": "llama3.2", "messages": MESSAGES, "stream": False}).status_code == 200
            )
    refused = gateway.call(explain.explain(question, fleet, gateway.components.limits, defaults, 4096))
    assert (refused["status"], refused["refused_by"]) == (429, "rpm") and 0 < refused["passes_in_s"] <= 61


def test_limits_are_explained_without_redis(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start_gateway(alpha)

    async def away(_: object) -> None:
        raise RedisUnavailable

    monkeypatch.setattr(gateway.components.limits, "preview", away)
    question = Question(rights_of(gateway, gateway.key(rpm=3)), "llama3.2", operation_of("/api/chat"), 10, 10)
    fleet, defaults = endpoints.fleet_as_seen(gateway.components), default_quota(gateway.settings)
    explained = gateway.call(explain.explain(question, fleet, gateway.components.limits, defaults, 4096))
    assert explained["limits"][0] == {"models": "all", "limit": "rpm", "of": 3, "used": None} and explained["status"] == 200
    assert "Redis is unreachable" in explained["limits_decided_by"]


@pytest.fixture
def installation(tmp_path: Path, stores: TestStores, fleet: list[FakeBackend]) -> Iterator[tuple[dict[str, str], str, str]]:
    """A running gateway as operators have it: its settings, its address and a key named alice."""
    stored = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url}
    names = environment_for(*fleet, **stored, MODEL_ALIASES=ALIASES)
    key = operate(tmp_path, names, "key", "--name", "alice", "--rpm", "50").split()[-1]
    with serving(tmp_path, names) as (_, url, _):
        yield names, url, key


def chat(url: str, key: str, **headers: str) -> Any:

    return httpx.post(f"{url}/api/chat", json=BODY, headers={"Authorization": f"Bearer {key}", **headers}, timeout=20)


def test_the_verbs_of_an_operator(
    tmp_path: Path, installation: tuple[dict[str, str], str, str], fleet: list[FakeBackend], stores: TestStores
) -> None:
    names, url, key = installation
    time.sleep(1.2)  # until the process has published its state
    asked = ("explain", "--key", "alice", "--model", "llama3.2", "--client", "ollama")
    printed = operate(tmp_path, names, *asked)
    assert (
        printed.startswith("would go to alpha now: it is the first in order with a free slot; first token in about ")
        and "translated to /v1/chat/completions" in printed
        and "running processes: 1" in printed
    )
    assert next(line for line in printed.splitlines() if " rpm " in line).split()[-3:] == ["50", "0", "50"]

    # Of a model that is not there: all that is known.
    printed = operate(tmp_path, names, "explain", "--key", "alice", "--model", "lama3.2")
    assert "NOT KNOWN to any backend" in printed and printed.count("does not have this model") == 3
    assert next(line for line in printed.splitlines() if " rpm " in line).split()[:5] == ["all", "rpm", "50", "0", "50"]
    refused = "would be refused with 403 model_not_available: no backend has this model, `make models` lists all models\n"
    assert printed.startswith(refused)

    # Of an alias: what it leads to, and each copy.
    printed = operate(tmp_path, names, "explain", "--key", "alice", "--model", "llama-mini", "--client", "ollama")
    assert "it is an alias of qwen3:8b, then llama3.2:latest\n" in printed and printed.startswith("would go to alpha now")
    rows = [line.split()[:3] for line in printed.splitlines() if line.startswith(("1", "2", "3"))]
    assert rows == [["1", "alpha", "qwen3:8b"], ["2", "alpha", "llama3.2:latest"], ["3", "beta", "llama3.2:latest"]]
    printed = operate(tmp_path, names, "explain", "--key", "alice", "--model", "dead")
    assert "NOT KNOWN to any backend" in printed and "it is an alias of nobody-has-it:latest\n" in printed

    operate(tmp_path, names, "drain", "--backend", "alpha")
    until(lambda: chat(url, key).json()["model"] and fleet[1].calls("/api/chat"), 10)
    assert json.loads(operate(tmp_path, names, *asked, "--json"))["backend"] == "beta"
    assert "drained by an operator" in operate(tmp_path, names, *asked)
    before = len(fleet[0].calls("/api/chat"))
    operate(tmp_path, names, "undrain", "--backend", "alpha")
    until(lambda: chat(url, key).status_code == 200 and len(fleet[0].calls("/api/chat")) > before, 10)

    fleet[0].play_once("/api/chat", answer(500, {"error": "no: CUDA error"}))
    fleet[1].healthy.cached = lambda _: 1
    fleet[1].healthy.durations = lambda _: (2, 0.5, 1)
    assert chat(url, key, **{"X-Request-ID": "a-story"}).status_code == 200
    until(lambda: sql(stores.database_url, "SELECT count(*) FROM audit WHERE request_id = 'a-story'") == [1], 10)
    story = operate(tmp_path, names, "trace", "--id", "a-story")
    assert "attempt  alpha: bad_status (status 500: CUDA error) after" in story and "backend  beta, as llama3.2:latest" in story
    assert "key      alice" in story and "end      200 answered" in story
    assert "prompt + 4 completion (reported), 1 of the prompt cached; all count for limits" in story
    assert "chosen   order: it was the first in order with a free slot\n" in story and " ms were estimated\n" in story
    assert "(reported): 2.000 for the load that it caused, 0.500 for the prompt, 1.000 for the answer\n" in story


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "--key", "nobody", "--model", "x"), "there is no active key 'nobody': see `make keys`"),
        (
            ("explain", "--key", "alice", "--model", "x", "--client", "/v2"),
            "'/v2' is not a client or a route: write ollama, openai, anthropic, responses, or one of",
        ),
        (("trace", "--id", "unheard-of"), "no request 'unheard-of' in the audit"),
        (("drain", "--backend", "omega"), "there is no backend 'omega': write one of alpha"),
    ],
)
def test_errors_name_what_is_wrong(
    tmp_path: Path, stores: TestStores, alpha: FakeBackend, words: tuple[str, ...], message: str
) -> None:
    names = environment_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)
    operate(tmp_path, names, "key", "--name", "alice")
    with pytest.raises(AssertionError, match="error: ") as failed:
        operate(tmp_path, names, *words)
    assert message in str(failed.value)


def test_a_key_that_is_no_longer_valid(start_gateway: StartGateway, fleet: list[FakeBackend]) -> None:
    """Expired it is refused as any wrong key; revoked it is not there."""
    gateway = start_gateway(*fleet)
    gateway.key(name="over", lifetime=timedelta(seconds=-1))
    revoked = gateway.key(name="revoked").split("_")[1]
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
        asked = {"key": "over", "model": "llama3.2"}
        explained = admin.get("/admin/v1/explain", params=asked).json()
        assert (explained["status"], explained["outcome"]) == (401, "invalid_api_key")
        assert admin.delete(f"/admin/v1/keys/{revoked}").status_code == 200
        assert admin.get("/admin/v1/explain", params={**asked, "key": "revoked"}).status_code == 404


def test_the_time_until_a_limit_passes_is_a_duration() -> None:
    found = {"status": 429, "outcome": "budget_spent", "refused_by": "day", "passes_in_s": 26493.0}
    assert cli_explain._verdict(found).endswith("it passes in about 7h21m33s")
