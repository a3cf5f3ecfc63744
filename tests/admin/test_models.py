"""Operators load, unload and pull models through the admin API: with progress, on several backends, and with clear refusals."""

import json
import math
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.auth.key import ADMIN
from gateway.fleet import discovery, model_jobs
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.answers import SIZE
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import ROUTED_SIZE, Memory
from tests.support.fake_backend.scripts import NDJSON, Forever, Head, Pause, Piece, Step, answer, compact, ndjson, stream
from tests.support.gateway_settings import entry_of
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
PULLING: list[Step] = [
    Head(200, [("Content-Type", NDJSON)], chunked=True),
    Piece(compact({"status": "pulling manifest"}) + b"\n"),
    Piece(compact({"status": "pulling aa", "digest": "sha256:aa", "total": 1000, "completed": 250}) + b"\n"),
]


@pytest.fixture
def router() -> Iterator[FakeBackend]:
    """llama.cpp in router mode."""
    with FakeBackend("openai", ["tiny"], name="router") as backend:
        backend.healthy.memory = Memory()
        yield backend


@pytest.fixture
def vllm() -> Iterator[FakeBackend]:
    with FakeBackend("openai", ["big"], name="vllm") as backend:
        yield backend


@pytest.fixture
def gateway(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, router: FakeBackend, vllm: FakeBackend
) -> RunningGateway:
    for backend in (alpha, beta):
        backend.healthy.memory = Memory()
    return start_gateway(alpha, beta, router, vllm)


@pytest.fixture
def admin(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.http(gateway.key(name="ops", flags=(ADMIN,))) as client:
        client.base_url = httpx.URL(f"{gateway.url}/admin/v1")
        yield client


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def done(admin: httpx.Client, verb: str, **body: Any) -> list[dict[str, Any]]:
    """The last row of each backend; the stream has its proper end."""
    answered = admin.post(f"/{verb}", json=body)
    assert (answered.status_code, answered.headers["content-type"]) == (200, "text/event-stream"), answered.text
    *rows, last = events(answered.text)
    found = list({(row["backend"], row["model"]): row for row in rows}.values())
    assert last == {"ended": True, "failed": [row["backend"] for row in found if row["state"] == "failed"]}
    return found


def refused(admin: httpx.Client, verb: str, status: int = 400, **body: Any) -> str:
    answered = admin.post(f"/{verb}", json=body)
    assert answered.status_code == status, answered.text
    found: str = answered.json()["error"]
    return found


def memory(backend: FakeBackend) -> Memory:
    assert backend.healthy.memory is not None
    return backend.healthy.memory


def test_a_model_is_loaded_where_its_calls_go_first(admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend) -> None:
    memory(alpha).load_s = 0.4
    [row] = done(admin, "warm", model="llama3.2")
    assert (row["backend"], row["state"], row["detail"]) == ("alpha", "done", "loaded")
    assert 0.35 < row["load_s"] <= row["seconds"] + 0.1
    assert (memory(alpha).loaded, memory(beta).loaded) == ({MODEL}, set())
    [asked] = alpha.calls("/api/generate")
    assert "prompt" not in asked.json
    [row] = done(admin, "warm", model="llama3.2")
    assert row["detail"] == "was loaded"
    [row] = done(admin, "warm", model=MODEL, backend="beta")
    assert (row["backend"], row["state"], memory(beta).loaded) == ("beta", "done", {MODEL})


def test_what_is_loaded_is_known_at_once(
    admin: httpx.Client, gateway: RunningGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    def loaded() -> list[str]:
        return [resident.model for resident in gateway.components.load.view()["alpha"].residents]

    done(admin, "warm", model=MODEL)
    until(lambda: loaded() == [MODEL], 5)
    done(admin, "unload", model=MODEL)
    until(lambda: loaded() == [], 5)


def test_progress_arrives_while_a_model_is_loading(admin: httpx.Client, alpha: FakeBackend) -> None:
    memory(alpha).load_s = 0.6
    with admin.stream("POST", "/warm", json={"model": MODEL}) as answered:
        lines = answered.iter_lines()
        first = events(next(lines))[0]
        assert (first["state"], memory(alpha).busy) == ("running", set()) and first["load_s"] is None
        assert [row["detail"] for row in events("\n".join(lines)) if "detail" in row][-1] == "loaded"


def test_the_seconds_of_earlier_loads_are_expected(admin: httpx.Client, stores: TestStores, gateway: RunningGateway) -> None:
    """As finished calls have taught them; what is only guessed is not shown."""
    assert done(admin, "warm", model=MODEL, backend="beta")[0]["expected_s"] is None
    with stores.client() as client:
        client.hset(redis_keys.COSTS, f"alpha {MODEL}", f"0 {time.time()} {math.log(12.5)} 1" + " 0 0" * 5)
        assert done(admin, "warm", model=MODEL)[0]["expected_s"] == 12.5
        # The other has the same model.
        assert done(admin, "warm", model=MODEL, backend="beta")[0]["expected_s"] == 12.5


def test_a_model_that_only_embeds_is_loaded(admin: httpx.Client, alpha: FakeBackend) -> None:
    memory(alpha).embedding.add(MODEL)
    [row] = done(admin, "warm", model=MODEL)
    assert (row["state"], memory(alpha).loaded) == ("done", {MODEL})
    [asked] = alpha.calls("/api/embed")
    assert "input" not in asked.json


def test_a_router_loads_and_unloads(admin: httpx.Client, router: FakeBackend) -> None:
    memory(router).load_s = 0.4
    [row] = done(admin, "warm", model="tiny")
    assert (row["backend"], row["detail"]) == ("router", "loaded") and row["load_s"] >= 0.35
    assert [row["detail"] for row in done(admin, "warm", model="tiny")] == ["was loaded"]
    memory(router).busy.add("tiny")
    [row] = done(admin, "unload", model="tiny")
    assert (row["state"], memory(router).loaded) == ("failed", {"tiny"}) and "1 calls in progress" in row["detail"]
    memory(router).busy.clear()
    [row] = done(admin, "unload", model="tiny")
    assert (row["detail"], row["freed_bytes"], memory(router).loaded) == ("unloaded", ROUTED_SIZE, set())
    memory(router).broken.add("tiny")
    [row] = done(admin, "warm", model="tiny")
    assert row["state"] == "failed" and "could not load it" in row["detail"]


def test_a_model_that_sleeps_is_woken(admin: httpx.Client, router: FakeBackend) -> None:
    memory(router).load("tiny")
    memory(router).asleep.add("tiny")
    assert [row["detail"] for row in done(admin, "unload", model="tiny")] == ["was not loaded"]
    assert memory(router).asleep == {"tiny"} and not router.calls("/slots")
    assert [row["detail"] for row in done(admin, "warm", model="tiny")] == ["loaded"]
    assert (memory(router).asleep, router.calls("/models/load")) == (set(), [])


def test_a_model_is_loaded_as_its_entry_says(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    alpha.healthy.memory = Memory(embedding={"bge:latest"})
    alpha.models.extend(["qwen3:8b", "bge:latest", "brief:latest"])
    models = {
        "llama3.2": {"keep_alive": "1h", "num_ctx": 8192},
        "qwen3:8b": {"keep_alive": -1, "num_ctx": "raise"},
        "bge": {"keep_alive": "30m"},
        "brief": {"keep_alive": 0},
    }
    gateway = start_gateway(entry_of(alpha, models=models))
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
        admin.base_url = httpx.URL(f"{gateway.url}/admin/v1")
        assert "keep_alive of 'brief' on alpha is 0" in refused(admin, "warm", model="brief")
        for model in ("llama3.2", "qwen3:8b", "bge"):
            assert done(admin, "warm", model=model)[0]["state"] == "done"
    sent = [request.json for request in alpha.calls("/api/generate")]
    wanted = {
        name: {field: body.get(field) for field in ("keep_alive", "options")} for name, body in zip("lqb", sent, strict=True)
    }
    assert wanted == {
        "l": {"keep_alive": 3600.0, "options": {"num_ctx": 8192}},
        "q": {"keep_alive": -1, "options": None},
        "b": {"keep_alive": 1800.0, "options": None},
    }
    assert [request.json for request in alpha.calls("/api/embed")] == [{"model": "bge:latest", "keep_alive": 1800.0}]


def test_what_a_backend_cannot_load_fails_with_its_words(
    admin: httpx.Client, gateway: RunningGateway, alpha: FakeBackend
) -> None:
    memory(alpha).broken.add(MODEL)
    [row] = done(admin, "warm", model=MODEL)
    assert (row["state"], row["detail"]) == ("failed", "llama-server process has terminated: signal: aborted")
    alpha.play("/api/generate", answer(500, {"error": f"failed at {alpha.url}"}))
    assert alpha.url not in done(admin, "warm", model=MODEL)[0]["detail"]
    gateway.wait_idle()
    assert {row["detail"] for row in gateway.audit_rows()} == {f"warm {MODEL} on alpha; failed: alpha"}


def test_a_load_in_progress_comes_first(admin: httpx.Client, stores: TestStores, alpha: FakeBackend) -> None:
    """As the gateways keep it in Redis while a call makes a backend load a model."""
    name = redis_keys.fleet_box("alpha")
    with stores.client() as client:
        client.hset(name, "loading", "other:latest c1 1 2")
        with admin.stream("POST", "/warm", json={"model": MODEL}) as answered:
            lines = answered.iter_lines()
            until(lambda: "waits until other:latest is loaded" in next(lines), 5)
            assert not alpha.calls("/api/generate")
            client.hdel(name, "loading")
            assert events("\n".join(lines))[-1] == {"ended": True, "failed": []}
        # One that has ended is still there until a script looks.
        # Its load is later than any answer of the backend that is on its way, so that none removes it.
        since = int(time.time() * 1000) + 60_000
        client.hset(name, mapping={"loading": "other:latest c1 1 2", "r:other:latest": f"1 {since} {since} 1 4096"})
        assert done(admin, "warm", model=MODEL)[0]["state"] == "done"
        # A load of the same model is joined.
        client.hset(name, "loading", f"{MODEL} c2 1 2")
        assert done(admin, "warm", model=MODEL)[0]["state"] == "done"


def test_a_list_that_waits_for_a_load_delays_none(
    admin: httpx.Client, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since 0.32.10 Ollama's list of loaded models waits for a load that is in progress."""
    monkeypatch.setattr(model_jobs, "SOON_S", 0.1)
    monkeypatch.setattr(discovery, "POLL_DEADLINE_S", 0.3)
    alpha.play("/api/ps", [Forever()])
    assert [row["detail"] for row in done(admin, "warm", model=MODEL)] == ["loaded"]
    assert done(admin, "unload", model=MODEL, backend="alpha")[0]["detail"] == "is busy with a load: try again"


def test_a_load_in_progress_is_waited_for_only_so_long(
    start_gateway: StartGateway, stores: TestStores, alpha: FakeBackend
) -> None:
    alpha.healthy.memory = Memory()
    gateway = start_gateway(entry_of(alpha, read_timeout_s=0.3))
    with stores.client() as client:
        client.hset(redis_keys.fleet_box("alpha"), "loading", "other:latest c1 1 2")
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
        [row, _] = events(admin.post("/admin/v1/warm", json={"model": MODEL}).text)[-2:]
    assert row["detail"] == "still loads other:latest after 0.3 s" and not alpha.calls("/api/generate")


def test_where_a_model_cannot_be_loaded(
    gateway: RunningGateway, admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend
) -> None:
    assert "no backend has the model 'nobody'" in refused(admin, "warm", 404, model="nobody")
    assert "there is no backend 'omega': write one of alpha, beta" in refused(admin, "warm", 404, model=MODEL, backend="omega")
    assert refused(admin, "warm", model=MODEL, backend="vllm").endswith("but alpha, beta")
    assert refused(admin, "warm", model="big").startswith("vllm has its models loaded always")
    admin.post("/backends/alpha/drain")
    until(lambda: gateway.components.backends["alpha"].is_drained, 5)
    assert refused(admin, "warm", model=MODEL, backend="alpha").startswith("alpha is drained: `make undrain BACKEND=alpha`")
    assert done(admin, "warm", model=MODEL)[0]["backend"] == "beta"
    beta.stop()
    admin.post("/refresh")
    words = refused(admin, "warm", model=MODEL)
    assert "alpha is drained" in words and "beta does not answer: unreachable" in words
    assert not alpha.calls("/api/generate")


@pytest.mark.parametrize(
    ("verb", "body", "words"),
    [
        ("warm", {}, "the model must be a string"),
        ("unload", {"model": 5}, "the model must be a string"),
        ("pull", {"model": ""}, "the model must be a string"),
        (
            "warm",
            {"model": MODEL, "backends": ["alpha"]},
            "'backends' is not a parameter of this route: it takes backend, model",
        ),
        ("warm", {"model": MODEL, "backend": ["alpha"]}, "backends are given by their names"),
        ("pull", {"model": MODEL, "backends": "alpha"}, "backends are given by their names"),
        ("pull", {"model": MODEL, "backends": [1]}, "backends are given by their names"),
        ("pull", {"model": MODEL, "backends": ["alpha", "vllm"]}, "vllm: only Ollama pulls models"),
        ("unload", {"model": "big"}, "vllm: models there are loaded always"),
    ],
)
def test_errors_name_what_is_wrong(admin: httpx.Client, verb: str, body: dict[str, Any], words: str) -> None:
    assert words in refused(admin, verb, **body)


def test_a_model_is_unloaded_wherever_it_is_loaded(admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend) -> None:
    memory(beta).load(MODEL)
    first, second = done(admin, "unload", model=MODEL)
    assert (first["backend"], first["detail"], first["freed_bytes"]) == ("alpha", "was not loaded", 0)
    assert (second["backend"], second["detail"], second["freed_bytes"]) == ("beta", "unloaded", SIZE)
    assert memory(beta).loaded == set() and not alpha.calls("/api/generate")
    memory(alpha).load(MODEL)
    memory(beta).load(MODEL)
    beta.stop()
    first, second = done(admin, "unload", model=MODEL)
    assert (first["detail"], second["state"]) == ("unloaded", "failed") and "unreachable" in second["detail"]


def test_ollama_unloads_after_the_calls_in_progress(
    admin: httpx.Client, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(alpha).load(MODEL)
    memory(alpha).busy.add(MODEL)
    with admin.stream("POST", "/unload", json={"model": MODEL, "backend": "alpha"}) as answered:
        lines = answered.iter_lines()
        until(lambda: "calls are in progress" in next(lines), 5)
        memory(alpha).busy.clear()
        assert events("\n".join(lines))[-2]["detail"] == "unloaded"
    monkeypatch.setattr(model_jobs, "WATCH_S", 0.1)
    memory(alpha).load(MODEL)
    memory(alpha).busy.add(MODEL)
    [row] = done(admin, "unload", model=MODEL, backend="alpha")
    assert (row["state"], row["freed_bytes"]) == ("done", None) and row["detail"].startswith("calls are in progress")


def test_a_model_is_pulled_on_all_boxes_at_once(
    gateway: RunningGateway, admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend, router: FakeBackend
) -> None:
    first, second = done(admin, "pull", model="qwen3:8b")
    for row, backend in ((first, "alpha"), (second, "beta")):
        facts = (row["backend"], row["state"], row["detail"], row["percent"], row["completed_bytes"], row["total_bytes"])
        assert facts == (backend, "done", "pulled", 100.0, SIZE, SIZE)
    # It can be used at once.
    with gateway.http(gateway.key()) as client:
        chat = {"model": "qwen3:8b", "messages": [{"role": "user", "content": "Hello"}]}
        assert client.post("/api/chat", json=chat).status_code == 200
    assert [row["backend"] for row in done(admin, "pull", model="other", backends=["beta", "beta"])] == ["beta"]
    assert "other:latest" in beta.models and "other:latest" not in alpha.models
    gateway.wait_idle()
    details = {row["detail"] for row in gateway.audit_rows() if row["route"] == "/admin/v1/pull"}
    assert details == {"pull qwen3:8b on alpha, beta", "pull other on beta"}
    assert not router.calls("/api/pull")


def test_one_box_that_fails_does_not_end_the_others(admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend) -> None:
    words = "pull model manifest: file does not exist"
    alpha.play("/api/pull", stream(ndjson([{"status": "pulling manifest"}, {"error": words}]), NDJSON))
    first, second = done(admin, "pull", model="qwen3")
    assert (first["state"], first["detail"], second["state"]) == ("failed", words, "done")
    alpha.play("/api/pull", answer(400, {"error": "invalid model name"}))
    assert done(admin, "pull", model="qwen3")[0]["detail"] == "invalid model name"
    alpha.play("/api/pull", stream(ndjson([{"status": "pulling manifest"}]), NDJSON))
    assert done(admin, "pull", model="qwen3")[0]["detail"] == "ended its answer before the model was there"
    alpha.play("/api/pull", answer(200, b"<html>" * 20_000, "text/html"))
    assert done(admin, "pull", model="qwen3")[0]["detail"] == "its answer is no list of records"
    alpha.play("/api/pull", answer(502, b"<html>", "text/html"))
    assert done(admin, "pull", model="qwen3")[0]["detail"] == "answered with status 502"


def test_a_pull_without_progress_is_given_up(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """Also one that only repeats what it has, as Ollama does while nothing arrives."""
    record = Piece(compact({"status": "pulling aa", "digest": "sha256:aa", "total": 1000, "completed": 250}) + b"\n")
    repeated = [step for _ in range(40) for step in (record, Pause(0.05))]
    gateway = start_gateway(entry_of(alpha, read_timeout_s=0.4))
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
        for silence in ([Forever()], repeated):
            alpha.play("/api/pull", [*PULLING, *silence])
            began = time.monotonic()
            row, _ = events(admin.post("/admin/v1/pull", json={"model": "qwen3"}).text)[-2:]
            assert (row["state"], row["detail"]) == ("failed", "made no progress for 0.4 s")
            assert time.monotonic() - began < 1.5
    assert alpha.wait_idle()


def test_a_client_that_leaves_ends_the_pull(
    gateway: RunningGateway, admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend
) -> None:
    for backend in (alpha, beta):
        backend.play("/api/pull", [*PULLING, Forever()])
    with admin.stream("POST", "/pull", json={"model": "qwen3"}) as answered:
        lines = answered.iter_lines()
        until(lambda: "25.0" in next(lines), 5)
        assert gateway.components.backends["alpha"].in_flight == 1
    assert alpha.wait_idle() and beta.wait_idle()
    assert [backend.calls("/api/pull")[0].outcome for backend in (alpha, beta)] == ["client_left"] * 2
    gateway.wait_idle()
    assert gateway.components.backends["alpha"].in_flight == 0
    [row] = [row for row in gateway.audit_rows() if row["route"] == "/admin/v1/pull"]
    assert (row["outcome"], row["detail"]) == ("client_gone", "pull qwen3 on alpha, beta")


def test_a_gateway_that_stops_ends_the_pull(gateway: RunningGateway, admin: httpx.Client, alpha: FakeBackend) -> None:
    alpha.play("/api/pull", [*PULLING, Forever()])
    with admin.stream("POST", "/pull", json={"model": "qwen3", "backends": ["alpha"]}) as answered:
        lines = answered.iter_lines()
        until(lambda: "25.0" in next(lines), 5)
        gateway.components.in_flight.draining = True
        assert "shutting down" in events("\n".join(lines))[-1]["error"]
    assert alpha.wait_idle()
