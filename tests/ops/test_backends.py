"""The verbs for backends: models, refresh, probe."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of
from tests.support.operator import CANARY, Operator
from tests.support.processes import until


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


def test_models_shows_what_is_native_and_what_is_translated(operator: Operator, alpha: FakeBackend, gamma: FakeBackend) -> None:
    with FakeBackend("openai", ["delta:8b"], name="delta", is_native=True) as delta:
        entries = [entry_of(alpha), entry_of(gamma, auth_token=CANARY), entry_of(delta)]
        operator.names["OLLAMA_BACKENDS"] = json.dumps(entries)
        header, *lines = operator.gets("models").splitlines()
        facts = operator.gets_json("models")
    assert header.split() == ["BACKEND", "MODEL", "SIZE", "SLOTS", "SLOTS", "FROM", "LOADED", "NATIVE", "TRANSLATED", "STATE"]
    for column, values in (
        ("NATIVE", ["ollama openai  ", "openai  ", "openai anthropic  "]),
        ("TRANSLATED", ["anthropic responses  ", "ollama anthropic responses  ", "ollama responses  "]),
        ("STATE", ["up", "up", "up"]),
    ):
        at = header.index(column)
        assert all(line[at:].startswith(value) for line, value in zip(lines, values, strict=False)), column
    rows: Any = facts["backends"]
    assert {(row["slots"], row["slots_from"]) for row in rows} == {(1000, "configured")}
    assert [(row["native"], row["translated"]) for row in rows] == [
        (["ollama", "openai"], ["anthropic", "responses"]),
        (["openai"], ["ollama", "anthropic", "responses"]),
        (["openai", "anthropic"], ["ollama", "responses"]),
    ]


def test_models_shows_what_is_loaded(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    alpha.models.extend(["second:7b", "third:latest"])
    in_100_s = (datetime.now(UTC) + timedelta(seconds=100)).isoformat()
    running = [{"name": "llama3.2", "size_vram": 2_000_000_000}, {"name": "second:7b", "expires_at": in_100_s}]
    alpha.play("/api/ps", answer(200, {"models": running}))
    with FakeBackend("openai", ["vllm"], name="gamma") as gamma:
        operator.with_backends(alpha, gamma)
        before: Any = operator.gets_json("models")["backends"]
        gateway = start_gateway(alpha, gamma)
        until(lambda: gateway.components.load.view()["alpha"].at, 5)
        rows: Any = operator.gets_json("models")["backends"]
    assert [row["loaded"] for row in before] == [None, None, None, "always"], "no gateway has asked"
    assert [row["loaded"] for row in rows[::2]] == ["2.0 GB", "no"] and rows[3]["loaded"] == "always"
    assert re.fullmatch(r"yes, \d{2,3} s left", rows[1]["loaded"])


def test_models_shows_the_age_of_the_catalog(operator: Operator, start_gateway: StartGateway, alpha: FakeBackend) -> None:
    start_gateway(alpha)
    operator.with_backends(alpha)
    facts = operator.gets_json("models")
    age, size = facts["map_age_s"], facts["map_bytes"]
    assert isinstance(age, float) and 0 <= age < 20 and isinstance(size, int) and size > 20


def test_models_shows_where_aliases_lead(operator: Operator, alpha: FakeBackend, beta: FakeBackend) -> None:
    operator.with_backends(alpha, beta)
    operator.names["MODEL_ALIASES"] = '{"Mini": ["missing", "llama3.2"], "claude-*": "missing"}'
    printed = operator.gets("models").splitlines()
    assert [" ".join(line.split()) for line in printed if line.startswith(("Mini", "claude"))] == [
        "Mini missing:latest, then llama3.2:latest llama3.2:latest on alpha, llama3.2:latest on beta",
        "claude-* missing:latest NOTHING",
    ]
    facts = operator.gets_json("models")
    assert facts["models"] == 1 and facts["aliases"] == [
        {
            "alias": "Mini",
            "targets": ["missing:latest", "llama3.2:latest"],
            "leads_to": "llama3.2:latest on alpha, llama3.2:latest on beta",
        },
        {"alias": "claude-*", "targets": ["missing:latest"], "leads_to": "NOTHING"},
    ]


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
        "speaks": ["ollama", "openai"],
        "slots": None,
        "token": "none needed",
        "problem": None,
    }
    assert isinstance(first["latency_ms"], float) and first["latency_ms"] > 0
    assert (second["token"], second["models"], second["problem"]) == ("accepted", 1, None)
    assert second["speaks"] == ["openai"]
    assert CANARY not in operator.gets("probe")
    assert not [call for backend in (alpha, gamma) for call in backend.requests if call.body and b"messages" in call.body]


def test_probe_finds_out_what_a_backend_speaks(operator: Operator) -> None:
    with FakeBackend(is_native=True) as ollama, FakeBackend("openai", name="llama", is_native=True) as openai:
        operator.with_backends(ollama, openai)
        first, second = operator.gets_json("probe").rows
        assert first["speaks"] == ["ollama", "openai", "anthropic", "responses"]
        # The events of llama.cpp's Responses API are not what official clients read.
        assert second["speaks"] == ["openai", "anthropic"]
        assert " ollama openai anthropic responses " in operator.gets("probe")


@pytest.mark.parametrize("token", ["", "stale-token"])
def test_probe_of_a_token_that_is_refused(operator: Operator, gamma: FakeBackend, token: str) -> None:
    operator.with_backends(gamma, auth_token=token)
    done = operator.types("probe", "--json")
    (row,) = json.loads(done.stdout)
    assert done.returncode == 1 and "some backends cannot be used" in done.stderr
    assert row["reachable"] is True and row["token"] == ("REFUSED" if token else "MISSING") and row["problem"]
    assert row["speaks"] is None


def test_probe_of_a_backend_with_a_public_list_whose_calls_need_a_token(operator: Operator, alpha: FakeBackend) -> None:
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
