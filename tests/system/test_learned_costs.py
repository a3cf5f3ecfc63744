"""Gateways learn what calls cost from the answers of their backends, together, and keep it over restarts."""

from typing import Any

import pytest

from gateway.fleet import cost_store
from gateway.fleet.cost_means import OUTPUT as OUTPUT_TOKENS
from gateway.fleet.costs import Rates
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import NDJSON, Pause, Step, answer, ndjson, sse, stream
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
NS = 10**9
MESSAGES = [{"role": "user", "content": "word " * 320}]
PROMPT, CACHED, OUTPUT = 400, 100, 40
LOAD_S, PREFILL_S, DECODE_S = 0.3, 0.05, 0.08
# What a played answer takes longer than it reports.
MORE_S = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_store, "EVERY_S", 0.3)


def last_record(load_s: float) -> dict[str, Any]:
    return {
        "model": MODEL,
        "done": True,
        "done_reason": "stop",
        "total_duration": round((load_s + PREFILL_S + DECODE_S) * NS),
        "load_duration": round(load_s * NS),
        "prompt_eval_count": PROMPT,
        "prompt_eval_cached_count": CACHED,
        "prompt_eval_duration": round(PREFILL_S * NS),
        "eval_count": OUTPUT,
        "eval_duration": round(DECODE_S * NS),
    }


def native(load_s: float, *, is_streamed: bool) -> list[Step]:
    took = Pause(load_s + PREFILL_S + DECODE_S + MORE_S)
    said = {"message": {"role": "assistant", "content": "Hi"}}
    if not is_streamed:
        return [took, *answer(200, {**said, **last_record(load_s)})]
    head, first, last, end = stream(ndjson([{"model": MODEL, **said, "done": False}, last_record(load_s)]), NDJSON)
    return [head, first, took, last, end]


def rates(gateway: RunningGateway) -> Rates:
    return gateway.components.costs.rates("alpha", MODEL)


def is_learned(gateway: RunningGateway) -> bool:
    return rates(gateway).is_learned


def ask(gateway: RunningGateway, key: str, path: str = "/api/chat", **more: Any) -> None:
    with gateway.http(key) as client:
        found = client.post(path, json={"model": MODEL, "messages": MESSAGES, "max_tokens": 400, **more})
        assert found.status_code == 200, found.text
        gateway.wait_idle()


def test_what_ollama_reports_is_learned_shared_and_kept(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway, other = start_gateway(alpha), start_gateway(alpha)
    key = gateway.key()
    alpha.play_once("/api/chat", native(LOAD_S, is_streamed=True), native(0.001, is_streamed=False))
    for is_streamed in (True, False):
        ask(gateway, key, stream=is_streamed)
    stated = LOAD_S, (PROMPT - CACHED) / PREFILL_S, OUTPUT / DECODE_S, OUTPUT
    assert rates(gateway)[:4] == pytest.approx(stated, rel=0.02)
    assert rates(gateway).service_s == pytest.approx(PREFILL_S + DECODE_S + MORE_S, abs=0.1)
    until(lambda: is_learned(other), 10)
    assert rates(other)[:4] == pytest.approx(stated, rel=0.02)
    for one in (gateway, other):
        one.stop()
    again = start_gateway(alpha)
    assert rates(again)[:4] == pytest.approx(stated, rel=0.02)
    row = again.components.costs.learned()[0]
    assert (row.backend, row.model) == ("alpha", MODEL) and row.size > 0
    assert again.components.costs.predicted_output("nobody", MODEL, None) == pytest.approx(OUTPUT)


def test_it_is_written_again_when_redis_has_lost_it(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores
) -> None:
    gateway = start_gateway(alpha)
    alpha.play_once("/api/chat", native(0.001, is_streamed=False))
    ask(gateway, gateway.key(), stream=False)
    with stores.client() as redis:
        field = f"alpha {MODEL}"
        until(lambda: redis.hexists(redis_keys.COSTS, field), 10)
        redis.delete(redis_keys.COSTS)
        until(lambda: redis.hexists(redis_keys.COSTS, field), 10)
    assert is_learned(gateway)


def test_metrics_show_it(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    alpha.play_once("/api/chat", native(LOAD_S, is_streamed=False))
    ask(gateway, gateway.key(), stream=False)
    metrics = gateway.components.metrics

    def shown(name: str) -> list[float]:
        text = gateway.call(metrics.exposition()).decode()
        wanted = f'gateway_backend_{name}{{backend="alpha",model="{MODEL}"}} '
        return [float(line.removeprefix(wanted)) for line in text.splitlines() if line.startswith(wanted)]

    until(lambda: shown("load_seconds"), 10)
    assert shown("load_seconds") == pytest.approx([LOAD_S], rel=0.02)
    assert shown("prefill_tokens_per_second") == pytest.approx([(PROMPT - CACHED) / PREFILL_S], rel=0.02)
    assert shown("decode_tokens_per_second") == pytest.approx([OUTPUT / DECODE_S], rel=0.02)
    assert len(shown("call_seconds")) == 1


def chunks(last: dict[str, Any]) -> list[bytes]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    usage = {"prompt_tokens": PROMPT, "completion_tokens": OUTPUT, "prompt_tokens_details": {"cached_tokens": CACHED}}
    return sse(
        [
            {**head, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}]},
            {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {**head, "choices": [], "usage": usage, **last},
        ]
    )


@pytest.fixture
def llama_cpp() -> Any:
    with FakeBackend("openai", [MODEL], name="alpha") as backend:
        yield backend


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/api/chat"])
def test_timings_of_llama_cpp_are_learned_also_from_translated_calls(
    start_gateway: StartGateway, llama_cpp: FakeBackend, path: str
) -> None:
    timings = {"prompt_n": PROMPT - CACHED, "cache_n": CACHED, "prompt_ms": PREFILL_S * 1000, "predicted_ms": DECODE_S * 1000}
    gateway = start_gateway(llama_cpp)
    head, *rest = stream(chunks({"timings": timings}))
    llama_cpp.play_once("/v1/chat/completions", [head, Pause(PREFILL_S + DECODE_S + MORE_S), *rest])
    ask(gateway, gateway.key(), path, stream=True, input=MESSAGES)
    assert rates(gateway)[1:4] == pytest.approx(((PROMPT - CACHED) / PREFILL_S, OUTPUT / DECODE_S, OUTPUT), rel=0.02)


def test_without_reports_the_clock_counts(start_gateway: StartGateway, llama_cpp: FakeBackend) -> None:
    gateway = start_gateway(llama_cpp)
    head, first, *rest = stream(chunks({}))
    llama_cpp.play_once("/v1/chat/completions", [Pause(0.3), head, first, Pause(0.39), *rest])
    ask(gateway, gateway.key(), "/v1/chat/completions", stream=True)
    found = rates(gateway)
    # A busy machine makes both slower.
    assert 500 <= found.prefill_tps <= 1020 and 50 <= found.decode_tps <= 102
    assert 0.6 <= found.service_s <= 1.5


def test_an_answer_that_is_cut_short_teaches_nothing(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    head, first, *_ = native(0.001, is_streamed=True)
    alpha.play_once("/api/chat", [head, first])
    with gateway.http(gateway.key()) as client:
        client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES})
        gateway.wait_idle()
    assert gateway.components.costs.learned() == []


def test_of_many_calls_in_a_second_the_first_count(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key = gateway.key()
    with gateway.http(key) as client:
        for _ in range(60):
            client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES, "stream": False})
    entries = dict(gateway.components.costs.entries())
    # All sixty would weigh 25.
    assert 1 <= entries["alpha", MODEL].known.weights[OUTPUT_TOKENS] < 22
