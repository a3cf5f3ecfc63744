"""Which models the backends have loaded: who asks, how often, and what every process knows of it."""

import signal
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from gateway.fleet.residents import BackendLoad
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support import redis_server
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever, Hold, Received, Script, Steps, answer
from tests.support.gateway_settings import settings_for
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

PS = "/api/ps"
OFTEN = {"LOADED_MODELS_REFRESH_S": "0.2"}
SELDOM = {"LOADED_MODELS_REFRESH_S": "3600"}


def loaded(*models: str, **more: Any) -> Steps:
    entry = {"size": 3000, "size_vram": 2000, "context_length": 8192, "expires_at": "2318-08-21T18:05:00Z", **more}
    return answer(200, {"models": [{"name": model, **entry} for model in models]})


def load_of(gateway: RunningGateway, backend: str = "alpha") -> BackendLoad:
    found: BackendLoad = gateway.components.load.view()[backend]
    return found


def residents(gateway: RunningGateway, backend: str = "alpha") -> list[str]:
    return [resident.model for resident in load_of(gateway, backend).residents]


def look_soon(gateway: RunningGateway, backend: str = "alpha") -> None:
    gateway.loop.call_soon_threadsafe(gateway.components.load.look_soon, backend)


def test_one_process_asks_and_all_know(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    alpha.play(PS, loaded("a"))
    gateways = [start_gateway(alpha, **OFTEN) for _ in range(3)]
    until(lambda: all(residents(gateway) == ["a:latest"] for gateway in gateways), 5)
    alpha.play(PS, loaded("a", "b"))
    before = len(alpha.calls(PS))
    until(lambda: all(residents(gateway) == ["a:latest", "b:latest"] for gateway in gateways), 5)
    time.sleep(1.5)
    asked = len(alpha.calls(PS)) - before
    assert 3 <= asked <= 12, f"{asked} questions in about 1.7 s at one every 0.2 s"
    views = [load_of(gateway) for gateway in gateways]
    assert {(view.used, view.seen, view.loads, view.error) for view in views} == {(4000, 4000, 1, "")}
    assert all(view.residents[0].context == 8192 and view.residents[0].until is None for view in views)


def test_it_is_asked_at_once_and_once_more_while_an_answer_is_due(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, **SELDOM)
    until(lambda: load_of(gateway).at, 5)
    before = len(alpha.calls(PS))
    alpha.play(PS, loaded("b"))
    look_soon(gateway)
    until(lambda: residents(gateway) == ["b:latest"], 5)
    assert len(alpha.calls(PS)) == before + 1
    go_on = threading.Event()
    alpha.play(PS, [Hold(go_on), *loaded("c")])
    look_soon(gateway)
    until(lambda: len(alpha.calls(PS)) == before + 2, 5)
    for _ in range(5):
        look_soon(gateway)
    time.sleep(0.2)
    assert len(alpha.calls(PS)) == before + 2, "one question is in progress"
    go_on.set()
    until(lambda: residents(gateway) == ["c:latest"] and len(alpha.calls(PS)) == before + 3, 5)
    time.sleep(0.2)
    assert len(alpha.calls(PS)) == before + 3, "one waited"


def test_a_load_of_ours_outlives_an_answer_that_was_on_its_way(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    alpha.play(PS, loaded("a"))
    gateway = start_gateway(alpha, **SELDOM)
    until(lambda: residents(gateway) == ["a:latest"], 5)
    go_on = threading.Event()
    before = len(alpha.calls(PS))
    alpha.play(PS, [Hold(go_on), *loaded("a")])
    look_soon(gateway)
    until(lambda: len(alpha.calls(PS)) > before, 5)
    with stores.client() as client:
        seconds, micros = client.time()
        now = int(seconds * 1000 + micros // 1000) + 1
        client.hset(redis_keys.fleet_box("alpha"), "r:b:latest", f"5 {now} {now} 0 0")
    go_on.set()
    until(lambda: residents(gateway) == ["a:latest", "b:latest"], 5)
    look_soon(gateway)
    until(lambda: residents(gateway) == ["a:latest"], 5)


def test_a_silent_backend_delays_no_other_and_is_asked_less_often(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    beta.play(PS, [Forever()])
    gateways = [start_gateway(alpha, beta, **OFTEN) for _ in range(2)]
    until(lambda: all(load_of(gateway, "beta").error == "poll_timeout" for gateway in gateways), 8)
    before = len(alpha.calls(PS)), len(beta.calls(PS))
    time.sleep(1.5)
    asked = len(alpha.calls(PS)) - before[0], len(beta.calls(PS)) - before[1]
    assert asked[0] >= 4 and asked[1] <= 2, asked
    assert {residents(gateway)[0] for gateway in gateways} == {"llama3.2:latest"}
    beta.play(PS, loaded("b"))
    until(lambda: all(residents(gateway, "beta") == ["b:latest"] for gateway in gateways), 8)
    assert not load_of(gateways[0], "beta").error


def test_a_backend_that_loads_for_us_may_take_its_time(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    """Ollama 0.32.10 answers when the load is done."""
    gateway = start_gateway(alpha, **OFTEN)
    until(lambda: load_of(gateway).at, 5)
    with stores.client() as client:
        client.hset(redis_keys.fleet_box("alpha"), "loading", "big:70b\x1fcall\x1f1000\x1f99000")
    until(lambda: load_of(gateway).loading, 5)
    alpha.play(PS, [Forever()])
    before = len(alpha.calls(PS))
    until(lambda: len(alpha.calls(PS)) >= before + 2, 8)
    assert load_of(gateway).error == "" and residents(gateway) == ["llama3.2:latest"]


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(answer(500, {"error": "no"}), id="status"),
        pytest.param(answer(200, b"{"), id="no JSON"),
        pytest.param(answer(200, {"models": {"a": 1}}), id="no list"),
        pytest.param(answer(200, b'{"models":[' + b"[]," * 400_000 + b"[]]}"), id="many values"),
        pytest.param(answer(200, b" " * (8 * 2**20 + 1)), id="long"),
        pytest.param(answer(200, b"[" * 1_000_000), id="nested"),
    ],
)
def test_hostile_answers_change_nothing(start_gateway: StartGateway, alpha: FakeBackend, hostile: Script) -> None:
    gateway = start_gateway(alpha, **SELDOM)
    until(lambda: residents(gateway) == ["llama3.2:latest"], 5)
    alpha.play(PS, hostile)
    look_soon(gateway)
    until(lambda: load_of(gateway).error, 5)
    assert residents(gateway) == ["llama3.2:latest"]
    with gateway.http(gateway.key()) as client:
        assert client.get("/api/tags").status_code == 200


def test_a_backend_that_refuses_connections_has_nothing_loaded(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateways = [start_gateway(alpha, **SELDOM) for _ in range(2)]
    until(lambda: residents(gateways[0]) == ["llama3.2:latest"], 5)
    alpha.stop()
    with gateways[0].http(gateways[0].key()) as client:
        assert client.post("/api/chat", json={"model": "llama3.2", "messages": []}).status_code == 503
    until(lambda: load_of(gateways[0]).error and not residents(gateways[0]), 5)
    alpha.start()
    look_soon(gateways[1])
    until(lambda: residents(gateways[1]) == ["llama3.2:latest"], 5)
    assert load_of(gateways[1]).evictions == 0


def test_times_are_by_the_clock_of_the_backend(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    def an_hour_behind(request: Received) -> Steps:
        its_now = datetime.now(UTC) - timedelta(hours=1)
        left = (its_now + timedelta(seconds=100)).isoformat()
        body = {"models": [{"name": "a", "size_vram": 1, "expires_at": left}]}
        return answer(200, body, "application/json", ("Date", format_datetime(its_now, usegmt=True)))

    alpha.play(PS, an_hour_behind)
    gateway = start_gateway(alpha, **SELDOM)
    until(lambda: residents(gateway) == ["a:latest"], 5)
    (resident,) = load_of(gateway).residents
    assert resident.until is not None and 98 <= resident.until - resident.since <= 102


def test_without_redis_each_process_asks_for_itself(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    object.__setattr__(stores, "redis_url", "redis://127.0.0.1:1/0")
    gateways = [start_gateway(alpha, **OFTEN) for _ in range(2)]
    until(lambda: all(residents(gateway) == ["llama3.2:latest"] for gateway in gateways), 5)
    since = load_of(gateways[0]).residents[0].since
    alpha.play(PS, loaded("llama3.2", "b"))
    until(lambda: all("b:latest" in residents(gateway) for gateway in gateways), 5)
    assert load_of(gateways[0]).residents[0].since == since
    alpha.play(PS, loaded("b"))
    until(lambda: all(residents(gateway) == ["b:latest"] for gateway in gateways), 5)
    alpha.stop()
    until(lambda: load_of(gateways[0]).error, 5)


def test_a_redis_that_goes_and_comes_back(alpha: FakeBackend, stores: TestStores, tmp_path: Path) -> None:
    with redis_server.server(tmp_path) as (process, port):
        names = {"DATABASE_URL": stores.database_url, "REDIS_URL": f"redis://127.0.0.1:{port}", **OFTEN}
        with RunningGateway(settings_for(alpha, **names)) as gateway:
            until(lambda: residents(gateway) == ["llama3.2:latest"], 5)
            process.send_signal(signal.SIGSTOP)
            alpha.play(PS, loaded("b"))
            until(lambda: residents(gateway) == ["b:latest"], 5)
            process.send_signal(signal.SIGCONT)
            alpha.play(PS, loaded("c"))
            until(lambda: residents(gateway) == ["c:latest"], 5)
            with gateway.http() as client:
                until(lambda: client.get("/readyz").json()["redis"] == "ok", 5)
            until(lambda: load_of(gateway).loads, 5)


def routed(**states: str) -> Steps:
    entries = [{"id": name, "status": {"value": value, "args": []}} for name, value in states.items()]
    return answer(200, {"data": [{**entry, "meta": {"size": 700, "n_ctx": 4096}} for entry in entries]})


def test_a_router_is_asked_and_other_servers_have_their_models_always(start_gateway: StartGateway) -> None:
    router, plain = FakeBackend("openai", name="router"), FakeBackend("openai", ["Vllm-Model"], name="plain")
    with router, plain:
        router.play("/v1/models", routed(one="loaded", two="unloaded"))
        gateway = start_gateway(router, plain, **OFTEN)
        until(lambda: residents(gateway, "router") == ["one:latest"], 5)
        found, always = load_of(gateway, "router"), load_of(gateway, "plain")
        assert (found.swaps, found.used, found.residents[0].context, found.residents[0].until) == (True, 700, 4096, None)
        assert (always.swaps, residents(gateway, "plain"), always.used) == (False, ["vllm-model:latest"], 0)
        router.play("/v1/models", routed(one="loaded", two="loaded"))
        until(lambda: residents(gateway, "router") == ["one:latest", "two:latest"], 5)
        assert not plain.calls(PS) + router.calls(PS)
        before = len(plain.calls("/v1/models"))
        time.sleep(0.5)
        assert len(plain.calls("/v1/models")) == before


def test_clients_and_the_gateway_share_the_answers(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, **SELDOM)
    until(lambda: load_of(gateway).at, 5)
    alpha.play(PS, loaded("llama3.2"))
    look_soon(gateway)
    until(lambda: load_of(gateway).used == 2000, 5)
    before = len(alpha.calls(PS))
    with gateway.http(gateway.key()) as client:
        (entry,) = client.get(PS).json()["models"]
        assert entry["size_vram"] == 2000 and len(alpha.calls(PS)) == before, "the answer is new enough"
        time.sleep(1.1)
        alpha.play(PS, loaded("llama3.2", size_vram=2500))
        assert client.get(PS).json()["models"][0]["size_vram"] == 2500
    assert load_of(gateway).used == 2500, "what a client asked for is known to all"
