"""Limits of a key: each is exact; a request takes from all or none; a refusal names the limit and when it would pass."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from ollama import ResponseError
from openai import RateLimitError

from gateway.auth.key import ADMIN, ADMIN_MODELS
from gateway.dialects.tokens import Need
from gateway.limits import admission
from gateway.limits.admission import WindowUsage
from gateway.limits.fallback import FallbackLimiter, Share
from gateway.limits.quota import UNLIMITED, CounterSet
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS, MESSAGES, MODEL, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Hold, Step, answer
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

FEW_TOKENS = {"options": {"num_predict": 20}, "max_tokens": 20}


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


@pytest.fixture
def held(alpha: FakeBackend) -> Iterator[threading.Event]:
    """Every chat waits for this event."""
    event = threading.Event()

    def script(request: Any) -> list[Step]:
        return [Hold(event), *alpha.healthy(request)]

    for chat in CHATS:
        alpha.play(chat.path, script)
    yield event
    event.set()


def ask(client: httpx.Client, chat: Chat, **more: Any) -> httpx.Response:
    return client.post(chat.path, json={**chat.body, **more})


def error_message(response: httpx.Response, chat: Chat) -> str:
    error = response.json()["error"]
    return str(error if chat.dialect == "ollama" else error["message"])


def limits(name: str, most: int) -> dict[str, Any]:
    return {name: most}


def limit(gateway: RunningGateway, name: str, pattern: str = "", **values: int | None) -> None:
    gateway.call(gateway.key_store().limit(name, pattern, values))


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_requests_per_minute(gateway: RunningGateway, chat: Chat) -> None:
    with gateway.http(gateway.key(rpm=2)) as client:
        statuses = [ask(client, chat).status_code for _ in range(4)]
        refused = ask(client, chat)
    assert statuses == [200, 200, 429, 429]
    assert error_message(refused, chat).startswith("Limit of 2 requests per minute for this key reached; try again in ")
    assert 50 < float(refused.headers["retry-after-ms"]) / 1000 <= 60 and 50 < int(refused.headers["retry-after"]) <= 60
    assert "x-should-retry" not in refused.headers


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_tokens_per_minute(gateway: RunningGateway, chat: Chat) -> None:
    with gateway.http(gateway.key(tpm=60)) as client:
        answers = [ask(client, chat, **FEW_TOKENS) for _ in range(20)]
    statuses = [found.status_code for found in answers]
    assert 1 < statuses.count(200) < 12 and statuses == sorted(statuses)
    assert error_message(answers[-1], chat).startswith("Limit of 60 tokens per minute for this key reached; try again in ")
    spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in gateway.audit_rows())
    assert spent <= 60


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_requests_at_once(gateway: RunningGateway, held: threading.Event, chat: Chat) -> None:
    key = gateway.key(concurrent=3)
    statuses: Counter[int] = Counter()

    def one() -> None:
        with gateway.http(key) as client:
            statuses[ask(client, chat).status_code] += 1

    threads = [threading.Thread(target=one) for _ in range(10)]
    for thread in threads:
        thread.start()
    until(lambda: statuses[429] == 7)
    held.set()
    for thread in threads:
        thread.join()
    assert statuses == {200: 3, 429: 7}
    with gateway.http(key) as client:
        assert ask(client, chat).status_code == 200


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize(("name", "words"), [("day", "tokens per day"), ("month", "tokens per month")])
def test_budgets(gateway: RunningGateway, chat: Chat, name: str, words: str) -> None:
    with gateway.http(gateway.key(**limits(name, 60))) as client:
        answers = [ask(client, chat, **FEW_TOKENS) for _ in range(20)]
    assert answers[0].status_code == 200 and answers[-1].status_code == 429
    assert f"Limit of 60 {words} for this key reached; try again in " in error_message(answers[-1], chat)
    assert answers[-1].headers["x-should-retry"] == "false"
    if chat.dialect == "openai":
        assert (answers[-1].json()["error"]["type"], answers[-1].json()["error"]["code"]) == ("insufficient_quota",) * 2
    assert sum(row["prompt_tokens"] + row["completion_tokens"] for row in gateway.audit_rows()) <= 60


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("name", ["rpm", "tpm", "concurrent", "day", "month"])
def test_a_limit_of_zero_allows_nothing(gateway: RunningGateway, chat: Chat, name: str) -> None:
    with gateway.http(gateway.key(**limits(name, 0))) as client:
        refused = ask(client, chat)
    assert refused.status_code == 429 and "retry-after" not in refused.headers
    assert refused.headers["x-should-retry"] == "false" and ": it allows none. `make limit KEY=" in error_message(refused, chat)


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("name", ["rpm", "tpm", "concurrent", "day", "month"])
def test_limits_of_the_models_of_a_rule(gateway: RunningGateway, chat: Chat, name: str) -> None:
    key = gateway.key(name="mine")
    limit(gateway, "mine", "llama3*", **{name: 0})
    with gateway.http(key) as client:
        refused = ask(client, chat)
        assert refused.status_code == 429 and "for this model with this key" in error_message(refused, chat)
    limit(gateway, "mine", "llama3*", **{name: None})
    limit(gateway, "mine", "qwen*", **{name: 0})
    with gateway.http(key) as client:
        assert wait_for_status(client, chat, 200)


def wait_for_status(client: httpx.Client, chat: Chat, status: int, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if ask(client, chat).status_code == status:
            return True
        time.sleep(0.05)
    return False


def test_a_changed_limit_applies_within_a_second(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    one, other = start_gateway(alpha, DEFAULT_RPM="1"), start_gateway(alpha, DEFAULT_RPM="1")
    key = one.key(name="mine")
    with one.http(key) as first, other.http(key) as second:
        assert [ask(client, CHATS[0]).status_code for client in (first, second)] == [200, 429]
        limit(one, "mine", rpm=UNLIMITED)
        assert wait_for_status(second, CHATS[0], 200)
        limit(one, "mine", rpm=None)
        assert wait_for_status(second, CHATS[0], 429)
        limit(one, "mine", rpm=0)
        until(lambda: "it allows none" in error_message(ask(second, CHATS[0]), CHATS[0]), 1.0)


def test_a_refused_request_takes_from_no_limit(gateway: RunningGateway, stores: TestStores) -> None:
    """Also not from the limits that it passes."""
    key = gateway.key(name="mine", rpm=100, tpm=5000, day=10**9)
    limit(gateway, "mine", "llama3*", concurrent=0)
    with gateway.http(key) as client:
        refused = [ask(client, CHATS[1]) for _ in range(20)]
        assert {found.status_code for found in refused} == {429}
        limit(gateway, "mine", "llama3*", concurrent=None)
        assert wait_for_status(client, CHATS[1], 200)
        passed = ask(client, CHATS[1])
    assert int(passed.headers["x-ratelimit-remaining-requests"]) == 98
    with stores.client() as redis:
        assert not any(redis.exists(shared.leases, shared.calls) for shared in redis_keys.BY_SHARD)


def test_every_answer_has_rate_limit_headers(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(rpm=10, tpm=10_000)) as client:
        first, second = (ask(client, CHATS[2], max_tokens=100) for _ in range(2))
        listed = client.get("/v1/models")
    assert [found.headers["x-ratelimit-remaining-requests"] for found in (first, second, listed)] == ["9", "8", "7"]
    assert first.headers["x-ratelimit-limit-requests"] == "10" and first.headers["x-ratelimit-limit-tokens"] == "10000"
    assert 9_800 < int(first.headers["x-ratelimit-remaining-tokens"]) < 9_900
    assert 9_950 < int(listed.headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert first.headers["x-ratelimit-reset-requests"] in ("1m0s", "1m1s") or first.headers[
        "x-ratelimit-reset-requests"
    ].startswith("1m0.")


def test_an_unlimited_key_gets_no_rate_limit_headers(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(rpm=UNLIMITED, tpm=UNLIMITED)) as client:
        assert not [name for name in ask(client, CHATS[2]).headers if name.startswith("x-ratelimit")]


def test_requests_without_tokens_count_as_requests(gateway: RunningGateway) -> None:
    """Such as lists, show, loading and unloading."""
    with gateway.http(gateway.key(rpm=8, tpm=0)) as client:
        statuses = [client.get(path).status_code for path in ("/api/tags", "/api/ps", "/api/version", "/v1/models")]
        statuses.append(client.post("/api/show", json={"model": MODEL}).status_code)
        statuses.append(client.post("/api/generate", json={"model": MODEL}).status_code)
        statuses.append(client.post("/api/chat", json={"model": MODEL, "keep_alive": 0}).status_code)
        statuses.append(client.post("/api/chat", json={"model": MODEL, "messages": MESSAGES}).status_code)
        statuses.append(client.get("/api/tags").status_code)
        statuses.append(client.get("/api/tags").status_code)
    assert statuses == [200] * 7 + [429, 200, 429]
    assert {row["tokens_from"] for row in gateway.audit_rows()} == {"none"}


CHAT = {"model": MODEL, "messages": MESSAGES}
# Status, method, path, arguments, and the flag of the key.
REFUSED: list[tuple[int, str, str, dict[str, Any], str]] = [
    (403, "POST", "/api/chat", {"json": {**CHAT, "model": "no-such-model"}}, ""),
    (403, "POST", "/v1/chat/completions", {"json": {**CHAT, "model": "no-such-model"}}, ""),
    (404, "POST", "/api/show", {"json": {"model": "no-such-model"}}, ADMIN_MODELS),
    (400, "POST", "/v1/embeddings", {"content": b"no JSON"}, ""),
    (400, "POST", "/api/generate", {"content": b""}, ""),
    (413, "POST", "/api/chat", {"content": b" " * 8_400_000}, ""),
    (415, "POST", "/api/chat", {"json": CHAT, "headers": {"Content-Encoding": "br"}}, ""),
    (400, "POST", "/api/chat", {"json": CHAT, "headers": {"Content-Encoding": "gzip"}}, ""),
    (403, "POST", "/api/pull", {"json": {"model": "x"}}, ""),
    (403, "GET", "/api/status", {}, ""),
    (400, "POST", "/api/pull", {"json": {"model": "x"}, "headers": {"X-Gateway-Backend": "nobody"}}, ADMIN_MODELS),
    (400, "POST", "/api/pull", {"content": b"no JSON"}, ADMIN_MODELS),
    (400, "HEAD", "/api/blobs/sha256:no", {}, ADMIN_MODELS),
    (403, "GET", "/v1/models/no-such-model", {}, ""),
    (403, "GET", "/admin/v1/overview", {}, ""),
    (403, "POST", "/admin/v1/keys", {"json": {"name": "more"}}, ""),
    (400, "POST", "/admin/v1/keys", {"content": b"no JSON"}, ADMIN),
]


def test_a_request_refused_for_another_reason_counts(gateway: RunningGateway) -> None:
    for status, method, path, more, flag in REFUSED:
        for place in ("", "/k/{}"):
            key = gateway.key(rpm=2, flags=(flag,) if flag else ())
            with gateway.http("" if place else key) as client:
                found = [client.request(method, place.format(key) + path, **more) for _ in range(4)]
            assert [one.status_code for one in found] == [status, status, 429, 429], (method, path, place)
            assert [one.headers.get("x-ratelimit-remaining-requests") for one in found] == ["1", "0", "0", "0"]
    outcomes = Counter(row["outcome"] for row in gateway.audit_rows())
    assert outcomes["refused:rate_limit_exceeded"] == outcomes.total() // 2 == 4 * len(REFUSED)


def test_a_body_that_never_ends_counts_as_a_request(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its client leaves or is too slow."""
    monkeypatch.setattr("gateway.proxy.body.BODY_DEADLINE_S", 0.05)
    key, address = gateway.key(rpm=2), ("127.0.0.1", int(gateway.url.rpartition(":")[2]))
    head = f"POST /api/chat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nContent-Length: 99\r\n\r\n{{".encode()

    def begin(answer: bytes) -> None:
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(head)
            assert connection.recv(12) == answer

    begin(b"HTTP/1.1 408")
    monkeypatch.setattr("gateway.proxy.body.BODY_DEADLINE_S", 30)
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(head)
        until(lambda: gateway.components.in_flight.total == 1)
    until(lambda: gateway.request_lines()[-1]["outcome"] == "client_gone")
    monkeypatch.setattr("gateway.proxy.body.BODY_DEADLINE_S", 0.05)
    begin(b"HTTP/1.1 429")
    with gateway.http(key) as client:
        assert client.get("/api/tags").status_code == 429


def test_retry_after_stays_within_what_client_libraries_obey(gateway: RunningGateway) -> None:
    """Most wait for 60 seconds at most, some for less; after a longer retry-after they try three times within two seconds."""
    with gateway.http(gateway.key(tpm=60)) as client:
        while (refused := ask(client, CHATS[0], **FEW_TOKENS)).status_code == 200:
            pass
    assert "x-should-retry" not in refused.headers and 0 < float(refused.headers["retry-after-ms"]) < 60_000
    for wait_s, retry_after_s, is_final in [
        (60.7, 59.9, False),
        (61, 59.9, False),
        (60, 59.9, False),
        (59.5, 59.5, False),
        (63, 63, True),
        (None, None, True),
    ]:
        counter_set = CounterSet("abcdefgh", 1, 1, 1, -1, -1)
        error = admission.limit_error("tpm", counter_set, wait_s, [], 5)
        assert (error.retry_after, (b"x-should-retry", b"false") in error.headers) == (retry_after_s, is_final)


def test_a_refusal_names_the_command_that_changes_the_limit(gateway: RunningGateway) -> None:
    key = gateway.key(name="mine", rpm=1)
    with gateway.http(key) as client:
        ask(client, CHATS[0])
        key_id = key.split("_")[1]
        assert f"`make limit KEY={key_id} RPM=…` changes it; DEFAULT_RPM sets it for keys without" in error_message(
            ask(client, CHATS[0]), CHATS[0]
        )
        limit(gateway, "mine", rpm=None, day=0)
        assert error_message(ask(client, CHATS[0]), CHATS[0]).endswith(f"`make limit KEY={key_id} DAY=…` changes it.")
        limit(gateway, "mine", "llama3*", rpm=0)
        limit(gateway, "mine", day=None)
        assert error_message(ask(client, CHATS[0]), CHATS[0]).endswith(
            f"`make limit KEY={key_id} MODEL='llama3*' RPM=…` changes it."
        )


def test_a_request_larger_than_the_limit_is_refused_without_retry_after(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(tpm=100)) as client:
        refused = ask(client, CHATS[2], max_tokens=500)
    assert refused.status_code == 429 and refused.headers["x-should-retry"] == "false" and "retry-after" not in refused.headers
    assert "this request alone may take 5" in refused.json()["error"]["message"]
    assert refused.json()["error"]["type"] == "tokens"


def test_sequential_calls_are_never_refused_by_a_limit_of_one_at_once(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """The slot is free in all processes before the client can know that its answer has ended."""
    one, other = start_gateway(alpha), start_gateway(alpha)
    key = one.key(concurrent=1)
    with one.http(key) as first, other.http(key) as second:
        for n in range(150):
            chat = CHATS[n % 4]
            assert ask(first, chat).status_code == 200
            assert ask(second, chat).status_code == 200


def test_openai_backs_off_and_succeeds(gateway: RunningGateway, held: threading.Event) -> None:
    key = gateway.key(concurrent=1)
    with gateway.http(key) as client:
        waiting = threading.Thread(target=lambda: ask(client, CHATS[2]))
        waiting.start()
        until(lambda: gateway.components.limits.admitted == 1)
        with gateway.openai(key, max_retries=20) as official:
            began = time.monotonic()
            threading.Timer(0.7, held.set).start()
            assert official.chat.completions.create(model=MODEL, messages=MESSAGES).choices[0].message.content
            assert time.monotonic() - began > 0.5
        waiting.join()


def test_openai_does_not_retry_what_takes_long(gateway: RunningGateway) -> None:
    with gateway.openai(gateway.key(day=1), max_retries=5) as official, pytest.raises(RateLimitError, match="tokens per day"):
        official.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert len(gateway.request_lines()) == 1


@pytest.mark.parametrize("name", ["concurrent", "tpm", "day"])
def test_an_estimated_wait_is_at_least_a_second(gateway: RunningGateway, held: threading.Event, name: str) -> None:
    """Libraries try twice more: with a retry-after of a tenth of a second they would give up while the call runs."""
    most = 1 if name == "concurrent" else 1000
    with gateway.http(gateway.key(**limits(name, most))) as client:
        held.set()
        for _ in range(10):
            assert ask(client, CHATS[0], **FEW_TOKENS).status_code == 200
        held.clear()
        running = threading.Thread(target=lambda: ask(client, CHATS[0], options={"num_predict": 500}))
        running.start()
        until(lambda: gateway.components.limits.admitted == 1)
        refused = ask(client, CHATS[0], options={"num_predict": 500})
        held.set()
        running.join()
    assert refused.status_code == 429 and float(refused.headers["retry-after-ms"]) >= 1000


def test_the_ollama_client_gets_the_error_and_succeeds_later(gateway: RunningGateway, held: threading.Event) -> None:
    key = gateway.key(concurrent=1)
    with gateway.http(key) as client:
        waiting = threading.Thread(target=lambda: ask(client, CHATS[0]))
        waiting.start()
        until(lambda: gateway.components.limits.admitted == 1)
        with pytest.raises(ResponseError, match="Limit of 1 requests at once for this key reached; try") as refused:
            gateway.ollama(key).chat(MODEL, MESSAGES)
        assert refused.value.status_code == 429
        held.set()
        waiting.join()
        assert gateway.ollama(key).chat(MODEL, MESSAGES).message.content


def test_a_failed_backend_costs_no_tokens(gateway: RunningGateway, alpha: FakeBackend) -> None:
    with gateway.http(gateway.key(tpm=2000)) as client:
        for chat in CHATS:
            alpha.play(chat.path, answer(500, {"error": "no"}))
            for _ in range(5):
                assert ask(client, chat, **FEW_TOKENS).status_code in (502, 503)
            alpha.play(chat.path, None)
        passed = ask(client, CHATS[1], **FEW_TOKENS)
    assert int(passed.headers["x-ratelimit-remaining-tokens"]) > 1900


def test_a_budget_that_is_set_again_counts_what_was_spent_in_between(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(name="mine", day=10_000)) as client:
        assert ask(client, CHATS[0]).status_code == 200
        limit(gateway, "mine", day=UNLIMITED)
        for _ in range(10):
            until(lambda: ask(client, CHATS[0]).status_code == 200)
        spent = sum(row["prompt_tokens"] + row["completion_tokens"] for row in gateway.audit_rows())
        limit(gateway, "mine", day=spent)
        assert wait_for_status(client, CHATS[0], 429)


def test_all_spellings_of_a_model_share_one_rule(gateway: RunningGateway) -> None:
    key = gateway.key(name="mine")
    limit(gateway, "mine", "LLAMA3.2", rpm=0)
    with gateway.http(key) as client:
        assert wait_for_status(client, CHATS[0], 429)
        limit(gateway, "mine", "llama3.2:latest", rpm=100)
        assert wait_for_status(client, CHATS[0], 200)


def test_one_request_seeds_the_budgets_of_a_key_and_of_its_rule(gateway: RunningGateway, stores: TestStores) -> None:
    key = gateway.key(name="mine", day=100_000)
    limit(gateway, "mine", "llama3.2", month=100_000)
    with gateway.http(key) as client:
        assert wait_for_status(client, CHATS[0], 200)
        with stores.client() as redis:
            until(lambda: len(list(redis.scan_iter("*:b:*"))) == 2)
            redis.flushall()
        assert ask(client, CHATS[0]).status_code == 200


def test_a_running_call_keeps_its_slot_when_redis_loses_its_data(
    gateway: RunningGateway, stores: TestStores, held: threading.Event
) -> None:
    with gateway.http(gateway.key(concurrent=1)) as client:
        first = threading.Thread(target=ask, args=(client, CHATS[0]))
        first.start()
        until(lambda: gateway.components.limits.admitted == 1)
        with stores.client() as redis:
            redis.flushall()
        gateway.call(gateway.components.limits.leases.renew())
        assert ask(client, CHATS[0]).status_code == 429
        held.set()
        first.join()
        assert ask(client, CHATS[0]).status_code == 200


def test_the_fallback_knows_how_long_a_budget_is_spent() -> None:
    counter_set = CounterSet("k", -1, -1, -1, 100, -1)
    local = FallbackLimiter()
    local.note(counter_set, WindowUsage(0, 0, 0, 0), 95, 95, 0, 0, 0)
    refused = local.admit(admission.Ticket("1", (counter_set,), "m", Need(10, 0), b"x"), 10, Share())
    assert refused is not None and refused.limit == "day" and refused.wait_s
    left = 86_400 - time.time() % 86_400
    assert abs(refused.wait_s - left) < 5


def set_mean(gateway: RunningGateway, stores: TestStores, tokens: int) -> None:
    canonical = "llama3.2:latest"
    gateway.components.limits.estimates.output_tokens[canonical] = tokens
    with stores.client() as redis:
        for shared in redis_keys.BY_SHARD:
            redis.hset(shared.means, canonical, tokens)


@pytest.mark.parametrize("name", ["tpm", "day", "month"])
def test_no_request_is_refused_because_of_an_estimate(gateway: RunningGateway, stores: TestStores, name: str) -> None:
    """However long the model's answers to others are."""
    set_mean(gateway, stores, 4093)
    with gateway.http(gateway.key(**limits(name, 3000))) as client, gateway.http(gateway.key(**limits(name, 3))) as other:
        passed = client.post(CHATS[0].path, json=CHATS[0].body)
        named = ask(client, CHATS[0], options={"num_predict": 3500})
        too_long = other.post(CHATS[0].path, json=CHATS[0].body)
    assert passed.status_code == 200
    assert (named.status_code, named.headers["x-should-retry"]) == (429, "false"), "the requested output is not an estimate"
    assert (too_long.status_code, too_long.headers["x-should-retry"]) == (429, "false"), "the prompt is not an estimate"


def test_all_counter_sets_reserve_and_release_the_same_estimate(
    gateway: RunningGateway, stores: TestStores, held: threading.Event
) -> None:
    set_mean(gateway, stores, 4093)
    key = gateway.key(name="mine", tpm=3000)
    limit(gateway, "mine", "llama3.2", tpm=2000)
    with gateway.http(key) as client, stores.client() as redis:
        first = threading.Thread(target=client.post, args=(CHATS[0].path,), kwargs={"json": CHATS[0].body})
        first.start()
        until(lambda: gateway.components.limits.admitted == 1)
        (admitted,) = gateway.components.limits.leases.admitted.values()
        reserves = [redis_keys.counters(counter_set.name)[2] for counter_set in admitted.counter_sets]
        assert (admitted.reserved, redis.mget(reserves)) == (2000, [b"2000", b"2000"])
        refused = client.post(CHATS[0].path, json=CHATS[0].body)
        assert refused.status_code == 429 and "x-should-retry" not in refused.headers
        held.set()
        first.join()
        until(lambda: redis.mget(reserves) in ([None, None], [b"0", b"0"]))


def test_no_request_is_refused_because_of_an_estimate_within_a_share(gateway: RunningGateway) -> None:
    limits = gateway.components.limits
    limits.estimates.output_tokens["m"], limits.share = 4093, lambda: Share(0, 4)
    counter_sets = (CounterSet("k", -1, 3000, -1, -1, -1), CounterSet("k|m", -1, -1, -1, 4000, 2800))
    ticket = admission.Ticket("1", counter_sets, "m", Need(10, None), b"x")

    async def decide() -> object:
        return limits._decide_locally(ticket, may_wait=False)

    admitted = gateway.call(decide())
    assert isinstance(admitted, admission.Admission) and admitted.reserved == 700
    limits.local.settle(admission.Settlement(admitted, 0, -1, b""))
    assert [limits.local._of(counter_set).reserved for counter_set in counter_sets] == [0, 0]
