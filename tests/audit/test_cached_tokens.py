"""Cached prompt tokens count by CACHED_TOKENS_WEIGHT, in limits, budgets and the audit alike."""

from collections.abc import Iterator
from datetime import UTC, datetime
from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audit import abandoned, token_usage
from gateway.audit.record import Record
from gateway.core import strict_json
from gateway.core.millionths import MILLION
from gateway.dialects.dialect import Dialect, Usage
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI
from gateway.dialects.tokens import Need
from gateway.limits.budgets import Budgets
from gateway.limits.quota import CounterSet
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import add_key, ago, billed, row, sql, write
from tests.support.chat_requests import CHATS, MODEL, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.content import Json, prompt_tokens
from tests.support.fake_backend.scripts import answer, recording, stream
from tests.support.running_gateway import RunningGateway

NO_DETAILS: list[Any] = [None, [], "x", 5, True]
NONSENSE: list[Any] = [-1, True, False, 5.0, 2**53, "5", None, [], {}, 10**30]
WORDS = "word " * 40
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": WORDS}], "max_tokens": 20, "options": {"num_predict": 20}}


# ── what backends report ──


def of_openai(details: Any, **more: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 40, "completion_tokens": 2, "prompt_tokens_details": details}, **more}


def of_ollama(**more: Any) -> dict[str, Any]:
    return {"done": True, "prompt_eval_count": 40, "eval_count": 2, **more}


@pytest.mark.parametrize(
    ("dialect", "body", "cached"),
    [
        (OpenAI(), {"usage": {"prompt_tokens": 40, "completion_tokens": 2}}, None),
        (OpenAI(), of_openai({"cached_tokens": 30}), 30),
        (OpenAI(), of_openai({"cached_tokens": 0, "audio_tokens": None}), 0),
        (OpenAI(), of_openai({}), None),
        (OpenAI(), of_openai({"cached_tokens": 30}, timings={"cache_n": 7, "prompt_n": 33, "predicted_n": 2}), 30),
        (OpenAI(), of_openai(None, timings={"cache_n": 30, "prompt_n": 10, "predicted_n": 2}), 30),
        (OpenAI(), of_openai(None, timings={"cache_n": -1, "prompt_n": 40, "predicted_n": 2}), None),
        (OpenAI(), of_openai(None, timings={"prompt_n": 40, "predicted_n": 2}), None),
        (OpenAI(), of_openai(None, timings=[30]), None),
        (OpenAI(), {"timings": {"cache_n": 30, "prompt_n": 10, "predicted_n": 2}}, 30),
        (OpenAI(), {"timings": {"prompt_n": 40, "predicted_n": 2}}, None),
        *((OpenAI(), of_openai(nonsense), None) for nonsense in NO_DETAILS),
        *((OpenAI(), of_openai({"cached_tokens": nonsense}), None) for nonsense in NONSENSE),
        (Ollama(), of_ollama(), None),
        (Ollama(), of_ollama(prompt_eval_cached_count=30), 30),
        (Ollama(), of_ollama(prompt_eval_cached_count=0), 0),
        *((Ollama(), of_ollama(prompt_eval_cached_count=nonsense), None) for nonsense in NONSENSE),
    ],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_cached_tokens_in_the_usage_of_a_backend(dialect: Dialect, body: dict[str, Any], cached: int | None) -> None:
    assert dialect.usage_of(body) == Usage(40, 2, cached)
    assert dialect.usage([strict_json.write_with_replacements(body)]) == Usage(40, 2, cached)


# ── what is billed ──


def cost_of(usage: Usage, weight: int, *, outcome: str = "answered") -> token_usage.TokenUsage:
    record = Record("id", "id", "POST", outcome=outcome, usage=usage, need=Need(100, 10), was_sent=True, relayed_tokens=3)
    return token_usage.usage_of(record, 1000, weight)


@given(st.integers(0, 60_000), st.integers(0, 2**53 - 1), st.integers(0, 1000), st.integers(0, MILLION))
def test_the_weight_is_exact_and_rounded_up(prompt: int, cached: int, completion: int, weight: int) -> None:
    found = cost_of(Usage(prompt, completion, cached), weight)
    there = min(cached, prompt)
    assert found.total == prompt - there + ceil(Fraction(there * weight, MILLION)) + completion
    assert (found.prompt, found.completion, found.cached) == (prompt, completion, there)
    assert (found.billed is None) == (found.total == prompt + completion), "only set if it is less"


@pytest.mark.parametrize(
    ("cached", "weight", "billed"),
    [(90, 0, 15), (90, 100_000, 24), (91, 100_000, 24), (1, 100_000, None), (90, MILLION, None), (0, 0, None), (500, 0, 5)],
)
def test_billed_tokens(cached: int, weight: int, billed: int | None) -> None:
    assert cost_of(Usage(100, 5, cached), weight) == token_usage.TokenUsage(100, 5, "reported", min(100, cached), billed)
    assert cost_of(Usage(100, 5, cached), weight, outcome="client_gone").billed == billed
    assert cost_of(Usage(100, 5, cached), weight, outcome="backend_failed") == token_usage.TokenUsage()


def test_an_estimated_prompt_has_no_cached_tokens() -> None:
    assert cost_of(Usage(None, 5, 90), 0) == token_usage.TokenUsage(100, 5, "estimated")
    assert cost_of(Usage(90, None, 80), 0) == token_usage.TokenUsage(90, 3, "estimated", 80, 13)


def test_cached_tokens_never_exceed_the_largest_possible_prompt() -> None:
    found = cost_of(Usage(10**9, 5, 10**9), 100_000)
    assert found.cached == found.prompt < 10**6 and found.total == ceil(found.prompt / 10) + 5


# ── through the gateway ──


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_limits_and_audit_agree(gateway: RunningGateway, alpha: FakeBackend, stores: TestStores, chat: Chat) -> None:
    alpha.healthy.cached = lambda _: 30
    with gateway.http(gateway.key(tpm=1000, day=10**6)) as client:
        response = client.post(chat.path, json={**CHAT, "stream": chat.streamed})
        left = client.get("/v1/models").headers["x-ratelimit-remaining-tokens"]
    (found, _) = gateway.audit_rows()
    assert (found["prompt_tokens"], found["completion_tokens"], found["tokens_from"]) == (40, 4, "reported")
    assert (found["cached_tokens"], found["billed_tokens"]) == (30, 10 + 3 + 4)
    assert stores.billed_today() == 17 and int(left) == 1000 - 17
    (line, _) = gateway.request_lines()
    assert (line["cached_tokens"], line["billed_tokens"]) == (30, 17)
    assert (b"cached" in response.content) == (chat != Chat("openai", True)), "only a client that asks for usage gets it"


@pytest.mark.parametrize(("weight", "counted"), [("0", 14), ("1", None), ("0.5", 29), ("0.333333", 24)])
def test_the_weight_of_cached_tokens_is_a_setting(
    start_gateway: StartGateway, alpha: FakeBackend, weight: str, counted: int | None
) -> None:
    gateway = start_gateway(alpha, CACHED_TOKENS_WEIGHT=weight)
    alpha.healthy.cached = lambda _: 30
    with gateway.http(gateway.key()) as client:
        assert client.post("/api/chat", json=CHAT).status_code == 200
    (found,) = gateway.audit_rows()
    assert (found["prompt_tokens"], found["cached_tokens"], found["billed_tokens"]) == (40, 30, counted)
    logged = [record.getMessage() for record in gateway.logged.records if "cached prompt token" in record.getMessage()]
    assert logged == [f"a cached prompt token counts as {weight} tokens"]


def test_the_recorded_stream_of_llama_cpp(gateway: RunningGateway, alpha: FakeBackend, stores: TestStores) -> None:
    data = recording("openai_chat_stream_llamacpp.sse")
    alpha.play("/v1/chat/completions", stream([data]))
    with gateway.http(gateway.key(day=10**6)) as client:
        assert client.post("/v1/chat/completions", json={**CHAT, "stream": True}).status_code == 200
    (found,) = gateway.audit_rows()
    assert (found["prompt_tokens"], found["completion_tokens"], found["cached_tokens"]) == (36, 12, 6)
    assert found["billed_tokens"] == 30 + 1 + 12 == stores.billed_today()


def test_unknown_cached_tokens_differ_from_zero(gateway: RunningGateway, alpha: FakeBackend) -> None:
    with gateway.http(gateway.key()) as client:
        for cached in (None, lambda _: None, lambda _: 0):
            alpha.healthy.cached = cached
            client.post("/api/chat", json=CHAT)
    assert [(found["cached_tokens"], found["billed_tokens"]) for found in gateway.audit_rows()] == [
        (None, None),
        (None, None),
        (0, None),
    ]


class PrefixCache:
    """The cache of a server: the first messages of a prompt that were the same in the prompt before."""

    def __init__(self) -> None:
        self._last: list[Any] = []

    def __call__(self, asked: Json) -> int:
        messages = asked["messages"]
        same = next((n for n, pair in enumerate(zip(messages, self._last, strict=False)) if pair[0] != pair[1]), None)
        again = messages[: len(self._last) if same is None else same]
        self._last = messages
        return prompt_tokens({"messages": again}) if again else 0


def turns_of_an_agent(gateway: RunningGateway, chat: Chat, most: int) -> int:
    """Each turn sends the whole conversation; returns how many turns pass a limit of tokens per minute."""
    messages: list[dict[str, str]] = [{"role": "system", "content": "word " * 300}]
    with gateway.http(gateway.key(tpm=4000)) as client:
        for turn in range(most):
            messages.append({"role": "user", "content": f"turn {turn} word word word"})
            got = client.post(chat.path, json={**CHAT, "messages": messages, "stream": chat.streamed})
            if got.status_code != 200:
                assert got.status_code == 429
                return turn
            messages.append({"role": "assistant", "content": f"answer {turn}"})
    return most


@pytest.mark.parametrize("chat", [Chat("openai", True), Chat("ollama", False)], ids=str)
def test_an_agent_with_a_cached_history_gets_more_turns(gateway: RunningGateway, alpha: FakeBackend, chat: Chat) -> None:
    without = turns_of_an_agent(gateway, chat, 60)
    alpha.healthy.cached = PrefixCache()
    assert without < 12
    assert turns_of_an_agent(gateway, chat, 60) > 3 * without


# ── rows of the audit ──


def test_budgets_are_seeded_with_what_was_billed(gateway: RunningGateway, alpha: FakeBackend, stores: TestStores) -> None:
    alpha.healthy.cached = lambda _: 30
    with gateway.http(gateway.key(month=10**6)) as client:
        for _ in range(3):
            assert client.post("/api/chat", json=CHAT).status_code == 200
        before = sum(map(billed, gateway.audit_rows()))
        with stores.client() as redis:
            redis.flushall()
        assert client.post("/api/chat", json=CHAT).status_code == 200
    assert before == 51 and stores.billed_today() == 4 * 17 == sum(map(billed, gateway.audit_rows()))


def test_rows_without_billed_tokens_count_all_their_tokens(gateway: RunningGateway, stores: TestStores) -> None:
    now, long_ago = datetime.now(UTC), ago(70)
    add_key(stores.database_url, "k1")
    some: list[dict[str, Any]] = [{}, {"cached_tokens": None, "billed_tokens": None}, {"cached_tokens": 3, "billed_tokens": 5}]
    rows = [row(now, key_id="k1", model=model, **more) for model in ("a", "b") for more in some]
    write(stores.database_url, [*rows, row(long_ago, key_id="k1", cached_tokens=3, billed_tokens=5)])

    async def seeded(name: str) -> int:
        await Budgets(gateway.components.database, gateway.components.store).seed(CounterSet(name, -1, -1, -1, 10, 10))
        found = await gateway.components.store.call(lambda redis: redis.hvals(redis_keys.budget(name)))
        assert len(set(found)) == 1, "of the day and of the month"
        return int(found[0])

    assert gateway.call(seeded("k1")) == 2 * (7 + 7 + 5)
    assert gateway.call(seeded("k1|a:*")) == 7 + 7 + 5


@pytest.fixture
def old_rows(gateway: RunningGateway, stores: TestStores) -> Iterator[list[dict[str, Any]]]:
    """Two rows that a gateway of an earlier version has left in Redis."""
    rows = [row(datetime.now(UTC), key_id="k1") for _ in range(2)]
    assert not rows[0].keys() & {"cached_tokens", "billed_tokens"}
    with stores.client() as redis:
        for each in rows:
            redis.xadd(redis_keys.BY_SHARD[3].rows, {"row": strict_json.write(each)})
    yield rows


def test_rows_of_an_earlier_version_are_written(gateway: RunningGateway, old_rows: list[dict[str, Any]]) -> None:
    found = gateway.audit_rows()
    assert {str(each["id"]) for each in found} == {str(each["id"]) for each in old_rows}
    assert [(each["cached_tokens"], each["billed_tokens"], billed(each)) for each in found] == [(None, None, 7)] * 2


def test_an_abandoned_call_is_billed_for_its_prompt(gateway: RunningGateway) -> None:
    """Also one that a gateway of an earlier version has begun."""
    scope, began = CounterSet("k1", -1, 100, -1, -1, -1), row(datetime.now(UTC), key_id="k1")
    for name in ("outcome", "prompt_tokens", "completion_tokens", "tokens_from", "status", "total_ms"):
        del began[name]
    settlement = abandoned.settlement_of("x", b"25 " + abandoned.call_info([scope], MODEL, 21, began))
    gateway.call(write_row(gateway, settlement.row))
    (found,) = gateway.audit_rows()
    assert (found["outcome"], found["prompt_tokens"], found["cached_tokens"]) == ("abandoned", 21, None)
    assert billed(found) == 21 == settlement.used


async def write_row(gateway: RunningGateway, row: bytes) -> None:
    await gateway.components.writer.write([row], [])


def test_billed_tokens_are_part_of_the_hash(gateway: RunningGateway, alpha: FakeBackend, stores: TestStores) -> None:
    alpha.healthy.cached = lambda _: 30
    with gateway.http(gateway.key()) as client:
        client.post("/api/chat", json=CHAT)
    gateway.audit_rows()
    hashes = sql(stores.database_url, "SELECT audit_hash(a) FROM audit a")
    assert sql(stores.database_url, "UPDATE audit SET billed_tokens = 1", "SELECT audit_hash(a) FROM audit a") != hashes


def test_malformed_counts_of_cached_tokens_are_ignored(gateway: RunningGateway, alpha: FakeBackend) -> None:
    done = {"model": MODEL, "message": {"role": "assistant", "content": "x"}, "done": True, "done_reason": "stop"}
    with gateway.http(gateway.key()) as client:
        for nonsense in NONSENSE:
            counts = {"prompt_eval_count": 40, "eval_count": 2, "prompt_eval_cached_count": nonsense}
            alpha.play("/api/chat", answer(200, {**done, **counts}))
            assert client.post("/api/chat", json={**CHAT, "stream": False}).status_code == 200
    assert {(found["cached_tokens"], billed(found)) for found in gateway.audit_rows()} == {(None, 42)}
