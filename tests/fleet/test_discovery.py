"""The models of all backends: their union, its age, which process polls, and what happens without backends or Redis."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Iterator

import pytest

from gateway.dialects.model_names import AllowList
from gateway.fleet import discovery, load, routes
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever, Script, Steps, answer
from tests.support.processes import until
from tests.support.running_gateway import LISTS_S, RunningGateway


@pytest.fixture
def beta() -> Iterator[FakeBackend]:
    with FakeBackend(models=["llama3.2:latest", "only-beta:7b"], name="beta") as backend:
        yield backend


def names(gateway: RunningGateway) -> set[str]:
    return set(gateway.components.discovery.catalog.models)


def test_a_new_model_is_usable_after_one_refresh(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.3")
    alpha.models.append("new:latest")
    until(lambda: "new:latest" in names(gateway), 2.0)
    alpha.models.remove("new:latest")
    until(lambda: "new:latest" not in names(gateway), 2.0)


def test_one_process_polls_and_the_others_load_its_map(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateways = [start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.5") for _ in range(3)]
    time.sleep(0.6)
    before = len(alpha.calls("/api/tags"))
    alpha.models.append("new:latest")
    until(lambda: all("new:latest" in names(gateway) for gateway in gateways), 3.0)
    time.sleep(2.0)
    polls = len(alpha.calls("/api/tags")) - before
    assert 3 <= polls <= 8, f"{polls} polls in about 2.5 s at one every 0.5 s"


def test_each_gateway_polls_its_own_backends_though_others_share_its_redis(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    """While OLLAMA_BACKENDS changes gateway by gateway, both lists are in use; one name may then have two addresses."""
    with FakeBackend(models=["moved:latest"], name="alpha") as moved:
        before = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.4")
        after = start_gateway(moved, beta, MODEL_DISCOVERY_REFRESH_S="0.4")
        slower = start_gateway(alpha, beta, MODEL_DISCOVERY_REFRESH_S="3600")
        for number in range(3):
            new = [f"new{number}:{name}" for name in ("alpha", "moved", "beta")]
            for backend, model in zip((alpha, moved, beta), new, strict=True):
                backend.models.append(model)
            until(lambda: new[0] in names(before) and {new[1], new[2]} <= names(after), 1.5)  # noqa: B023
            until(lambda: {new[0], new[2]} <= names(slower), 1.5)  # noqa: B023
        assert not {"moved:latest", "new0:moved", "new0:beta"} & names(before)
        assert "new0:alpha" not in names(after)


def test_the_catalog_in_redis_is_in_order_of_priority(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, stores: TestStores
) -> None:
    gateway = start_gateway(alpha, beta)
    with stores.client() as redis:
        stored = json.loads(redis.get("nz:map"))
        assert stored["models"] == {"llama3.2:latest": ["alpha", "beta"], "only-beta:7b": ["beta"]}
        assert b"models" in redis.get(discovery.snapshot_name(gateway.settings.backends[0]))


def test_a_slow_backend_does_not_delay_the_start(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    beta.play("/api/tags", [Forever()])
    began = time.monotonic()
    gateway = start_gateway(beta, alpha)
    assert time.monotonic() - began < 3.0 + LISTS_S
    assert names(gateway) == {"llama3.2:latest"}
    assert CHATS[0].ask(gateway, gateway.key()) == "alpha heard: Say hi"


def test_lists_do_not_wait_for_a_frozen_backend(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.3")
    with gateway.http(gateway.key()) as client:
        client.get("/api/tags")
        alpha.freeze()
        time.sleep(0.5)
        for path in ("/api/tags", "/v1/models", "/api/ps", "/api/version", "/v1/models/llama3.2"):
            began = time.monotonic()
            assert client.get(path).status_code == 200
            assert time.monotonic() - began < 1.5
    alpha.thaw()


def test_a_backend_that_fails_a_poll_keeps_its_models_for_a_while(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.2", MODEL_DISCOVERY_CACHE_TTL_S="1.5")
    with gateway.http(gateway.key()) as client:
        alpha.stop()
        time.sleep(0.6)
        assert [entry["name"] for entry in client.get("/api/tags").json()["models"]] == ["llama3.2:latest"]
        until(lambda: client.get("/api/tags").json()["models"] == [], 4.0)
        got = client.post("/api/chat", json=CHATS[0].body)
        assert got.status_code == 503 and got.headers["retry-after"]
        assert client.get("/readyz").status_code == 503
        alpha.start()
        until(lambda: client.get("/api/tags").json()["models"] != [], 4.0)
        assert client.get("/readyz").status_code == 200


def test_without_redis_each_process_polls_for_itself(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    dead = type(stores)(stores.database_url, "redis://127.0.0.1:1/0")
    object.__setattr__(stores, "redis_url", dead.redis_url)
    gateways = [start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.3") for _ in range(2)]
    alpha.models.append("new:latest")
    until(lambda: all("new:latest" in names(gateway) for gateway in gateways), 5.0)
    assert CHATS[0].ask(gateways[0], gateways[0].key()) == "alpha heard: Say hi"
    with gateways[0].http() as client:
        ready = client.get("/readyz")
        assert ready.status_code == 200 and ready.json()["redis"] == "degraded"


def test_a_backend_with_an_invalid_list_has_no_models(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    for body in (b"<html>", b"[]", b'{"models":null}', b'{"models":[{"name":5},{"model":""},"x",{"name":"good"}]}'):
        alpha.play("/api/tags", answer(200, body))
        gateway = start_gateway(alpha)
        gateway.call(gateway.components.discovery.refresh())
        expected = {"good:latest"} if b"good" in body else set()
        listed = {model.name.canonical for model in gateway.components.discovery.catalog.listed(AllowList())}
        assert listed <= expected | {"llama3.2:latest"}
    alpha.play("/api/tags", answer(200, {"error": "Unexpected endpoint or method. (GET /api/tags)"}))
    gateway.call(gateway.components.discovery.refresh())
    assert gateway.components.discovery.catalog.snapshots[0].error.startswith("bad_list")


def test_health_checks_never_generate(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.2")
    time.sleep(0.8)
    asked = [request for request in alpha.requests if request.path not in ("/api/tags", "/api/ps", "/api/version")]
    assert {request.path for request in asked} == set(routes.OPTIONAL)
    assert {(request.method, request.body) for request in asked} == {("POST", b"[]")}
    assert len(asked) == len(routes.OPTIONAL), "what is known is not asked for again"


@pytest.mark.parametrize("server", ["istio-envoy", "lm-studio", "uvicorn"])
def test_the_name_of_a_server_hides_no_path(start_gateway: StartGateway, alpha: FakeBackend, server: str) -> None:
    for path in routes.OPTIONAL:
        alpha.play(path, answer(400, {"error": "no"}, "application/json", ("Server", server)))
    [snapshot] = start_gateway(alpha).components.discovery.catalog.snapshots
    assert snapshot.routes == routes.OPTIONAL


def test_versions_and_running_models(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    alpha.play("/api/version", answer(200, {"version": "0.12.3-rc1+gw"}))
    beta.play("/api/version", answer(200, {"version": "v0.9.1"}))
    entry = {
        "name": "llama3.2:latest",
        "model": "llama3.2:latest",
        "size": 5,
        "digest": "a" * 64,
        "expires_at": "x",
        "size_vram": 5,
    }
    for backend in (alpha, beta):
        backend.play("/api/ps", answer(200, {"models": [{**entry, "details": {}}]}))
    gateway = start_gateway(alpha, beta)
    with gateway.http(gateway.key()) as client:
        assert client.get("/api/version").json() == {"version": "0.9.1"}
        running = client.get("/api/ps").json()["models"]
        assert [model["name"] for model in running] == ["llama3.2:latest"]
    with gateway.http(gateway.key("other")) as client:
        assert client.get("/api/ps").json() == {"models": []}


def test_a_model_that_runs_remotely_is_a_cloud_model(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    stub = {"name": "stub:latest", "digest": "a" * 64, "remote_host": "https://ollama.com", "remote_model": "stub"}
    alpha.models.append("stub:latest")
    alpha.play("/api/tags", answer(200, {"models": [stub]}))
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        assert client.get("/api/tags").json()["models"] == []
        assert client.post("/api/chat", json={"model": "stub", "messages": []}).status_code == 403
    with gateway.http(gateway.key("stub")) as client:
        assert client.post("/api/chat", json={"model": "stub", "messages": []}).status_code == 200


def test_the_catalog_is_replaced_as_a_whole_while_it_is_read(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway, stop = start_gateway(alpha), threading.Event()
    seen: set[int] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(len(gateway.components.discovery.catalog.models))

    reader = threading.Thread(target=read)
    reader.start()
    alpha.models.extend(f"m{number}:latest" for number in range(500))
    gateway.call(asyncio.wait_for(gateway.components.discovery.refresh(), 10))
    stop.set()
    reader.join()
    assert seen <= {1, 501}


def test_running_models_are_polled_on_demand_and_once_for_all_requests(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="60")
    with gateway.http(gateway.key()) as client:
        assert [entry["name"] for entry in client.get("/api/ps").json()["models"]] == ["llama3.2:latest"]
        alpha.play("/api/ps", answer(200, {"models": []}))
        until(lambda: client.get("/api/ps").json()["models"] == [], 5)
        before, began = len(alpha.calls("/api/ps")), time.monotonic()
        for _ in range(30):
            client.get("/api/ps")
        assert len(alpha.calls("/api/ps")) - before <= 2 + (time.monotonic() - began)


def test_a_request_for_running_models_does_not_wait_for_a_dead_backend(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "LONGEST_DEADLINE_S", 1.0)
    beta.play("/api/ps", [Forever()])
    gateway = start_gateway(alpha, beta, MODEL_DISCOVERY_REFRESH_S="60")
    with gateway.http(gateway.key()) as client:
        for _ in range(20):
            assert [entry["name"] for entry in client.get("/api/ps").json()["models"]] == ["llama3.2:latest"]
        gateway.components.load._silent_until.clear()
        until(lambda: "beta" not in gateway.components.load._asking, 10)
        calls = len(beta.calls("/api/ps"))
        for _ in range(10):
            client.get("/api/ps")
        assert len(beta.calls("/api/ps")) - calls <= 1


def listed(*entries: dict[str, object]) -> Steps:
    return answer(200, {"object": "list", "data": list(entries)})


def test_clients_get_the_numbers_by_which_they_size_their_context(start_gateway: StartGateway) -> None:
    meta = {"vocab_type": 2, "n_vocab": 151936, "n_ctx": 32768, "n_ctx_train": 40960, "n_params": 8 * 10**9, "size": 5 * 10**9}
    llama = {"id": "qwen3", "created": 5, "owned_by": "llamacpp", "meta": {**meta, "path": "/srv/qwen3.gguf", "n_embd": -1}}
    vllm = {
        "id": "org/model",
        "created": 6,
        "owned_by": "vllm",
        "root": "org/model",
        "max_model_len": 16384,
        "permission": [{}],
    }
    odd = {"id": "odd", "created": 7, "root": "/srv/models/odd", "max_model_len": "many", "context_length": 10**30, "meta": [1]}
    with FakeBackend("openai", ["qwen3"], name="beta") as beta:
        beta.play("/v1/models", listed(llama, vllm, odd))
        gateway = start_gateway(beta)
        with gateway.http(gateway.key()) as client:
            found = {entry["id"]: entry for entry in client.get("/v1/models").json()["data"]}
            shown = client.post("/api/show", json={"model": "qwen3"}).json()["model_info"]
            assert client.get("/v1/models/qwen3").json() == found["qwen3"]
    common = {"object": "model", "owned_by": "library"}
    assert found == {
        "qwen3": {**common, "id": "qwen3", "created": 5, "owned_by": "llamacpp", "meta": meta},
        "org/model": {**common, **{name: value for name, value in vllm.items() if name != "permission"}},
        "odd": {**common, "id": "odd", "created": 7},
    }
    assert shown["unknown.context_length"] == 32768


def test_a_model_keeps_the_creation_time_that_was_seen_first(start_gateway: StartGateway) -> None:
    clock = itertools.count(1_800_000_000)

    with FakeBackend("openai", ["old"], name="beta") as beta:
        beta.play("/v1/models", lambda _: listed(*({"id": name, "created": next(clock)} for name in beta.models)))
        gateway = start_gateway(beta)
        [first] = created(gateway)
        beta.models.append("new")
        for _ in range(2):
            gateway.call(gateway.components.discovery.refresh())
        old, new = created(gateway)
        assert old == first and new > old
        other = start_gateway(beta)
        other.call(other.components.discovery.refresh())
        assert created(other) == created(gateway) == [old, new]


def created(gateway: RunningGateway) -> list[int]:
    return [model.openai["created"] for model in gateway.components.discovery.catalog.models.values()]


def listing(digest: str | None) -> Script:
    return answer(200, {"models": [{"name": "llama3.2:latest", **({"digest": digest} if digest else {})}]})


def backends_of(gateway: RunningGateway) -> list[str]:
    return [offer.backend for offer in gateway.components.catalog().models["llama3.2:latest"].offers]


def test_copies_that_differ_are_logged_once_for_each_change(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    alpha.play("/api/tags", listing("a" * 64))
    beta.play("/api/tags", listing("sha256:" + "B" * 64))
    gateway = start_gateway(alpha, beta)

    def warnings() -> list[str]:
        gateway.call(gateway.components.discovery.refresh())
        return [record.getMessage() for record in gateway.logged.records if "differs" in record.getMessage()]

    words = "model llama3.2:latest differs between backends: aaaaaaaaaaaa on alpha, {} on beta"
    assert warnings() == warnings() == [words.format("bbbbbbbbbbbb")]
    assert backends_of(gateway) == ["alpha", "beta"], "both are used unless the digest decides"
    beta.play("/api/tags", listing("c" * 64))
    assert warnings() == [words.format("bbbbbbbbbbbb"), words.format("cccccccccccc")]
    beta.play("/api/tags", listing(None))
    assert len(warnings()) == 2, "a copy without a digest equals all others"


def test_only_copies_that_equal_the_first_count_where_the_digest_decides(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    alpha.play("/api/tags", listing("a" * 64))
    beta.play("/api/tags", listing("b" * 64))
    with FakeBackend("openai", ["llama3.2"], name="gamma") as gamma, FakeBackend(name="delta") as delta:
        delta.play("/api/tags", listing("A" * 64))
        names = {"DIGEST_PARITY": "distinct", "MODEL_DISCOVERY_CACHE_TTL_S": "1", "MODEL_DISCOVERY_REFRESH_S": "0.3"}
        gateway = start_gateway(alpha, beta, gamma, delta, **names)
        assert backends_of(gateway) == ["alpha", "gamma", "delta"]
        alpha.stop()
        delta.stop()
        until(lambda: backends_of(gateway) == ["beta", "gamma"], 5)
        alpha.start()
        until(lambda: backends_of(gateway)[0] == "alpha" and "beta" not in backends_of(gateway), 5)
