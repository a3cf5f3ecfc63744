"""One client's `num_ctx`, `keep_alive` and options of a runner reload, pin or unload a model for nobody else."""

import math
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet.backends.config import ModelConfig
from gateway.fleet.runner_options import Runner
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.runner import DEFAULT_CONTEXT, PlayedRunner
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2"
MESSAGES: Any = [{"role": "user", "content": "Say hi"}]
OPTIONS_OF_RUNNERS = ("num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "draft_num_predict")
Body = dict[str, Any]


def applied(runner: Runner, body: Body) -> tuple[Body, list[str]]:
    sent = dict(body)
    return sent, runner.apply(sent)


@pytest.mark.parametrize(
    ("loaded", "asked", "sent"),
    [
        (0, None, None),
        (0, 8192, 8192),
        (4096, None, 4096),
        (4096, 2048, 4096),
        (4096, 4096, 4096),
        (4096, 8192, 8192),
        (4096, 8192.9, 8192),
        (4096, -1, 4096),
        (0, -1, None),
        (131072, 10**9, 131072),
        (0, 10**9, 131072),
    ],
)
def test_a_smaller_context_is_raised_to_the_one_that_is_loaded(loaded: int, asked: Any, sent: int | None) -> None:
    runner = Runner(context=loaded, most_context=131072)
    body: Body = {"options": {"temperature": 1}} if asked is None else {"options": {"num_ctx": asked, "temperature": 1}}
    changed, names = applied(runner, body)
    assert changed["options"] == {"temperature": 1} | ({} if sent is None else {"num_ctx": sent})
    assert names == ([] if asked is None or asked == sent else ["options.num_ctx"])
    assert runner.needs_reload(body) == (sent is not None and 0 < loaded < sent) == runner.needs_reload(changed)
    assert runner.context_for(body) == sent


def test_options_of_runners_are_taken_out() -> None:
    body: Body = {
        "options": {**dict.fromkeys(OPTIONS_OF_RUNNERS, 1), "use_mlock": True, "num_ctx": None, "seed": 3},
        "shift": False,
    }
    changed, names = applied(Runner(), body)
    assert changed == {"options": {"seed": 3}}
    assert names == [*(f"options.{name}" for name in (*OPTIONS_OF_RUNNERS, "use_mlock")), "shift"]
    assert applied(Runner(), {"options": None, "shift": None}) == ({"options": None}, [])
    assert applied(Runner(), {"options": {}}) == ({"options": {}}, []) and applied(Runner(), {}) == ({}, [])


def test_an_entry_may_fix_the_context_or_pass_on_what_clients_ask_for() -> None:
    fixed, passed = ModelConfig(num_ctx=16384), ModelConfig(num_ctx="pass")
    assert applied(Runner(fixed, 4096), {"options": {"num_ctx": 99}}) == ({"options": {"num_ctx": 16384}}, ["options.num_ctx"])
    assert applied(Runner(fixed), {}) == ({"options": {"num_ctx": 16384}}, [])
    assert Runner(fixed, 4096).needs_reload({}) and not Runner(fixed, 16384).needs_reload({"options": {"num_ctx": 99}})
    assert not Runner(fixed, 8192, 8192).needs_reload({}), "more than it was trained with is not loaded"
    body: Body = {"options": {"num_ctx": 99, "num_gpu": 1}, "shift": False}
    assert applied(Runner(passed, 4096), body) == (body, [])
    for more in (body, {"options": {"num_ctx": 99}}, {"options": {"num_gpu": 1}}, {"shift": False}):
        assert Runner(passed, 4096).needs_reload(more) and not Runner(passed).needs_reload(more), "it is a load"
    assert not Runner(passed, 4096).needs_reload({"options": {"num_ctx": 4096, "seed": 1}, "shift": True})
    assert not Runner(passed, 4096).needs_reload({})


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        (-1, 1800),
        ("-1m", 1800),
        ("1h", 1800),
        (1800, 1800),
        ("30m", "30m"),
        ("10m", "10m"),
        (0, 300),
        ("0s", 300),
        (0.5, 300),
        ("300s", "300s"),
        ("nonsense", "nonsense"),
        (None, None),
    ],
)
def test_how_long_a_client_may_keep_a_model(asked: Any, sent: Any) -> None:
    changed, names = applied(Runner(longest_s=1800), {"keep_alive": asked})
    assert changed == {"keep_alive": sent} and names == ([] if asked == sent else ["keep_alive"])
    assert applied(Runner(longest_s=60), {"keep_alive": 0})[0] == {"keep_alive": 60}
    assert applied(Runner(), {"keep_alive": -1}) == ({"keep_alive": -1}, [])


def test_who_manages_models_may_unload_them_and_an_entry_fixes_how_long_they_stay() -> None:
    for zero in (0, "0", "0s", 0.0):
        assert applied(Runner(may_unload=True), {"keep_alive": zero}) == ({"keep_alive": zero}, [])
    assert applied(Runner(longest_s=900, may_unload=True), {"keep_alive": -1})[0] == {"keep_alive": 900}
    for seconds, written in ((math.inf, -1), (60.0, 60), (0.5, 0.5)):
        runner = Runner(ModelConfig(keep_alive_s=seconds), longest_s=900)
        assert applied(runner, {}) == ({"keep_alive": written}, [])
        assert applied(runner, {"keep_alive": None}) == ({"keep_alive": written}, [])
        assert applied(runner, {"keep_alive": "7m"}) == ({"keep_alive": written}, ["keep_alive"])
        assert applied(runner, {"keep_alive": "nonsense"}) == ({"keep_alive": "nonsense"}, [])


@given(
    asked=st.none() | st.integers(-10, 10**7) | st.floats(0, 1e7),
    others=st.dictionaries(st.sampled_from(OPTIONS_OF_RUNNERS), st.integers(0, 9)),
    loaded=st.integers(0, 200_000),
    kept=st.none() | st.integers(-5, 10**6) | st.sampled_from(["5m", "-1s", "0"]),
)
def test_what_was_changed_once_is_changed_no_more(asked: Any, others: Body, loaded: int, kept: Any) -> None:
    body: Body = {"options": {**others, "num_ctx": asked}, "keep_alive": kept}
    runner = Runner(context=loaded, most_context=131072, longest_s=1800)
    once, _ = applied(runner, body)
    twice, names = applied(runner, once)
    assert twice == once and names == []
    assert not once["options"].keys() & set(OPTIONS_OF_RUNNERS)


# ── Clients side by side ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def runner(alpha: FakeBackend) -> PlayedRunner:
    return PlayedRunner(alpha)


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, runner: PlayedRunner) -> Iterator[RunningGateway]:
    yield start_gateway(alpha)


def chat(gateway: RunningGateway, key: str, **more: Any) -> Any:
    return gateway.ollama(key).chat(MODEL, messages=MESSAGES, **more)


def post(gateway: RunningGateway, key: str, path: str, body: Body) -> httpx.Response:
    with gateway.http(key) as client:
        return client.post(path, json=body)


def wait_until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def context_known(gateway: RunningGateway) -> int:
    load = gateway.components.load.known.get("alpha")
    return load.residents[0].context if load and load.residents else 0


# As Continue, Zed, LangChain, Open WebUI and programs of their own send them.
CLIENTS: list[Body] = [
    {"options": {"num_ctx": 8192}, "keep_alive": 1800},
    {"options": {"num_ctx": 4096, "num_predict": 9}, "keep_alive": -1},
    {"options": {"num_ctx": 2048, "num_gpu": 99, "num_thread": 8}, "keep_alive": "5m"},
    {"options": {"temperature": 0.1, "num_batch": 1024, "use_mmap": False}, "keep_alive": 0},
    {},
    {"stream": True, "options": {"num_ctx": 8192}},
]


def test_clients_side_by_side_load_a_model_once(gateway: RunningGateway, runner: PlayedRunner) -> None:
    keys = [gateway.key() for _ in CLIENTS]

    def use(number: int) -> None:
        answered = chat(gateway, keys[number], **CLIENTS[number])
        if CLIENTS[number].get("stream"):
            answered = list(answered)[-1]
        assert answered.done

    use(0)
    with ThreadPoolExecutor(len(CLIENTS)) as pool:
        order = [number for number in range(len(CLIENTS)) for _ in range(5)]
        random.Random(3).shuffle(order)
        list(pool.map(use, order))
    assert [load["num_ctx"] for load in runner.loads] == [8192] and runner.unloads == 0
    assert 300 <= runner.keep_alive <= 1800


def test_a_larger_context_is_loaded_once_and_then_everybody_has_it(gateway: RunningGateway, runner: PlayedRunner) -> None:
    key = gateway.key()
    chat(gateway, key)
    wait_until(lambda: context_known(gateway) == DEFAULT_CONTEXT)
    for more in ({"options": {"num_ctx": 2048}}, {"options": {"num_ctx": 8192}}, {}, {"options": {"num_ctx": 512}}):
        chat(gateway, key, **more)
    assert [load["num_ctx"] for load in runner.loads] == [DEFAULT_CONTEXT, 8192]


def test_the_other_routes_of_ollama_are_treated_alike(
    gateway: RunningGateway, runner: PlayedRunner, alpha: FakeBackend
) -> None:
    client = gateway.ollama(gateway.key())
    client.chat(MODEL, messages=MESSAGES, options={"num_ctx": 8192})
    client.generate(MODEL, "Say hi", options={"num_ctx": 4096}, keep_alive=-1)
    client.embed(MODEL, "Say hi", options={"num_ctx": 2048}, keep_alive=0)
    client.embeddings(MODEL, "Say hi", options={"num_gpu": 1})
    client.generate(MODEL, keep_alive=-1)
    assert len(runner.loads) == 1
    assert [call.json.get("keep_alive") for path in ("/api/generate", "/api/embed") for call in alpha.calls(path)] == [
        1800,
        1800,
        300,
    ]


def test_a_context_that_was_not_loaded_is_forgotten(gateway: RunningGateway, runner: PlayedRunner, alpha: FakeBackend) -> None:
    key = gateway.key()
    body: Body = {"model": MODEL, "messages": MESSAGES, "stream": False, "options": {"num_ctx": 8192}}
    alpha.play_once("/api/chat", answer(500, {"error": "llama runner process has terminated"}))
    assert post(gateway, key, "/api/chat", body).status_code >= 500
    assert post(gateway, key, "/api/chat", {**body, "options": {}}).status_code == 200
    assert [load["num_ctx"] for load in runner.loads] == [DEFAULT_CONTEXT]


UNLOADS: list[tuple[str, Body, str]] = [
    ("/api/chat", {"messages": []}, "done_reason"),
    ("/api/generate", {}, "done_reason"),
    ("/api/generate", {"prompt": "", "stream": True}, "done_reason"),
    ("/api/embed", {"input": []}, "embeddings"),
    ("/api/embeddings", {"prompt": ""}, "embedding"),
]


@pytest.mark.parametrize(("path", "body", "answered"), UNLOADS)
def test_only_who_manages_models_unloads_one(
    gateway: RunningGateway, runner: PlayedRunner, alpha: FakeBackend, path: str, body: Body, answered: str
) -> None:
    chat(gateway, gateway.key())
    request = {"model": MODEL, **body, "keep_alive": 0}
    found = post(gateway, gateway.key(), path, request)
    assert found.status_code == 200 and found.json()[answered] in ("unload", [])
    assert alpha.calls(path)[1:] == [] and runner.loaded is not None
    [_, row] = gateway.audit_rows()
    assert (row["dropped"], row["backend"], row["status"]) == ("keep_alive", "", 200)
    post(gateway, gateway.admin_key(), path, request)
    assert alpha.calls(path)[-1].json["keep_alive"] == 0 and runner.unloads == 1


def test_a_model_that_is_unloaded_by_who_manages_it_is_loaded_as_the_next_asks(
    gateway: RunningGateway, runner: PlayedRunner
) -> None:
    chat(gateway, gateway.key(), options={"num_ctx": 8192})
    assert gateway.ollama(gateway.admin_key()).generate(MODEL, keep_alive=0).done_reason in ("unload", "load")
    assert runner.loaded is None
    chat(gateway, gateway.key(), options={"num_ctx": 2048})
    assert runner.loads[-1]["num_ctx"] == 2048


def test_changes_are_reported(gateway: RunningGateway, runner: PlayedRunner) -> None:
    key = gateway.key(flags=("show_backend",))
    body = {"model": MODEL, "messages": MESSAGES, "stream": False, "keep_alive": -1}
    options = {"num_ctx": 4096, "num_gpu": 1, "seed": 1}
    found = post(gateway, key, "/api/chat", {**body, "options": options, "shift": True})
    assert found.headers["x-gateway-dropped"] == "options.num_gpu, shift, keep_alive"
    assert "x-gateway-dropped" not in post(gateway, key, "/api/chat", {**body, "keep_alive": "10m"}).headers
    assert [row["dropped"] for row in gateway.audit_rows()] == ["options.num_gpu, shift, keep_alive", None]


def test_entries_and_the_setting_are_obeyed(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    runner = PlayedRunner(alpha)
    own = {"num_ctx": 16384, "keep_alive": "2h"}
    gateway = start_gateway(entry_of(alpha, models={"Library/LLAMA3.2": own}), MAX_KEEP_ALIVE_S="600")
    chat(gateway, gateway.key(), options={"num_ctx": 2048}, keep_alive=0)
    assert runner.loads == [{**runner.loads[0], "num_ctx": 16384}] and runner.keep_alive == 7200
    passed = start_gateway(entry_of(alpha, models={MODEL: {"num_ctx": "pass"}}), MAX_KEEP_ALIVE_S="600")
    chat(passed, passed.key(), options={"num_ctx": 2048, "num_gpu": 3}, keep_alive=-1)
    assert (runner.loads[-1]["num_ctx"], runner.loads[-1]["num_gpu"], runner.keep_alive) == (2048, 3, 600)


def test_a_call_in_another_dialect_loads_the_model_with_its_usual_context_for_all(
    gateway: RunningGateway, runner: PlayedRunner
) -> None:
    key = gateway.key()
    chat(gateway, key, options={"num_ctx": 8192})
    body: Body = {"model": MODEL, "messages": MESSAGES}
    for _ in range(2):
        post(gateway, key, "/v1/chat/completions", body)
        chat(gateway, key)
    assert [load["num_ctx"] for load in runner.loads] == [8192, DEFAULT_CONTEXT]


def test_calls_in_other_dialects_and_for_other_servers_are_left_alone(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    PlayedRunner(alpha)
    gateway = start_gateway(alpha)
    body: Body = {"model": MODEL, "messages": MESSAGES, "options": {"num_ctx": 99}, "keep_alive": -1}
    assert post(gateway, gateway.key(), "/v1/chat/completions", body).status_code == 200
    [sent] = alpha.calls("/v1/chat/completions")
    assert (sent.json["options"], sent.json["keep_alive"]) == ({"num_ctx": 99}, -1), "Ollama reads neither here"
