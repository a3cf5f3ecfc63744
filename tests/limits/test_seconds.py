"""Seconds of backends as a limit: exact over processes, restored from the audit, by shares without Redis."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from gateway.audit import abandoned
from gateway.audit.record import Record
from gateway.dialects.tokens import Need
from gateway.limits import admission
from gateway.limits.admission import Settlement, Ticket, WindowUsage
from gateway.limits.estimates import UNKNOWN_BACKEND_S, Estimates
from gateway.limits.fallback import FallbackLimiter, Share
from gateway.limits.quota import UNLIMITED, CounterSet
from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS, MESSAGES, MODEL, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Hold, Step
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

NATIVE = CHATS[0]
FAR = 10**6
# A refusal that names more is until the next day.
LONGEST_CALL_S = 60


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    """Its backend reports a second for each call in Ollama's API."""
    alpha.healthy.durations = lambda _: (0.25, 0.25, 0.5)
    return start_gateway(alpha)


def ask(client: httpx.Client, chat: Chat = NATIVE) -> httpx.Response:
    return client.post(chat.path, json=chat.body)


def limit(gateway: RunningGateway, name: str, pattern: str = "", **values: int | None) -> None:
    gateway.call(gateway.key_store().limit(name, pattern, values))


def counters(stores: TestStores, name: str) -> dict[str, int]:
    """What Redis counts for the seconds of a counter set, by the first letter of the field."""
    with stores.client() as redis:
        found: Any = redis.hgetall(redis_keys.seconds(name))
    return {field.decode()[0]: int(value) for field, value in found.items()}


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize(("name", "words"), [("day_seconds", "day"), ("month_seconds", "month")])
def test_a_key_without_seconds_left_is_refused(gateway: RunningGateway, chat: Chat, name: str, words: str) -> None:
    limits: Any = {name: 2}
    with gateway.http(gateway.key(**limits)) as client:
        assert [ask(client).status_code for _ in range(2)] == [200, 200]
        refused = ask(client, chat)
        listed = client.get("/api/tags")
    assert (refused.status_code, listed.status_code) == (429, 200)
    error = refused.json()["error"]
    message = error if chat.dialect == "ollama" else error["message"]
    assert message.startswith(f"Limit of 2 seconds of backends per {words} for this key reached; try again in ")
    assert f" {name.upper()}=…` changes it." in message
    if chat.dialect == "openai":
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    (row,) = [row for row in gateway.audit_rows() if row["status"] == 429]
    assert (row["detail"], row["backend_ms"]) == (name, None)
    retry_s = float(refused.headers["retry-after-ms"]) / 1000
    assert 0 < retry_s <= 86_400 * (1 if words == "day" else 31)
    assert refused.headers["x-should-retry"] == "false" or retry_s < 62


def test_a_limit_of_none_at_all(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(day_seconds=0)) as client:
        refused = ask(client)
    assert refused.status_code == 429 and "retry-after" not in refused.headers and "it allows none" in refused.json()["error"]


def test_without_a_report_the_time_of_the_slot_counts(gateway: RunningGateway, alpha: FakeBackend, stores: TestStores) -> None:
    alpha.healthy.pause_s = 0.05
    key = gateway.key(day_seconds=FAR)
    with gateway.http(key) as client:
        assert ask(client, CHATS[2]).status_code == 200
    (row,) = gateway.audit_rows()
    assert row["seconds_from"] == "slot" and row["backend_ms"] > 150
    spent = counters(stores, key.split("_")[1])
    assert spent["d"] == spent["m"] == round(row["backend_ms"]) and spent["r"] == 0


def test_a_rule_counts_the_calls_of_its_models_only(gateway: RunningGateway, alpha: FakeBackend) -> None:
    alpha.healthy.models.append("other:latest")
    gateway.call(gateway.components.discovery.refresh())
    key = gateway.key(name="mine")
    limit(gateway, "mine", "llama*", day_seconds=1)
    other = Chat("ollama", streamed=False)
    with gateway.http(key) as client:
        until(lambda: ask(client).status_code == 429)
        assert client.post(other.path, json={**other.body, "model": "other"}).status_code == 200


@pytest.mark.parametrize("slots", ["1000", "2"], ids=["none waits", "most wait"])
def test_three_gateways_admit_exactly_what_is_left(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, slots: str
) -> None:
    """Calls that take what was reserved for them are admitted until nothing is left, however many come at once."""
    alpha.healthy.durations = lambda _: (0, 0.5, 0.5)
    alpha.healthy.pause_s = 0.003
    gateways = [start_gateway(alpha, OLLAMA_SLOTS=slots) for _ in range(3)]
    key = gateways[0].key(name="mine", day_seconds=FAR)
    key_id = key.split("_")[1]
    clients = [each.http(key) for each in gateways]
    # Each process learns what a call of the key takes.
    assert [ask(client).status_code for client in clients] == [200] * 3
    limit(gateways[0], "mine", day_seconds=23)
    until(lambda: counters(stores, key_id).get("d") == 3000)

    def ask_until_spent(number: int) -> int:
        passed = 0
        while True:
            response = ask(clients[number % 3])
            if response.status_code == 200:
                passed += 1
            elif float(response.headers["retry-after"]) > LONGEST_CALL_S:
                return passed

    with ThreadPoolExecutor(9) as pool:
        assert sum(pool.map(ask_until_spent, range(9))) == 20
    for client in clients:
        client.close()
    assert counters(stores, key_id) == {"d": 23_000, "m": 23_000, "r": 0}
    assert sum(row["backend_ms"] or 0 for row in gateways[0].audit_rows()) == 23_000


@pytest.fixture
def held(alpha: FakeBackend) -> Iterator[threading.Event]:
    """Calls wait at the backend until it is set."""
    event = threading.Event()

    def script(request: Any) -> list[Step]:
        return [Hold(event), *alpha.healthy(request)]

    alpha.play(NATIVE.path, script)
    yield event
    event.set()


def test_calls_in_flight_reserve_what_they_will_take(
    gateway: RunningGateway, held: threading.Event, stores: TestStores
) -> None:
    key = gateway.key(day_seconds=10)
    key_id = key.split("_")[1]
    with gateway.http(key) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, client)
        until(lambda: gateway.components.limits.admitted == 1)
        assert counters(stores, key_id) == {"d": 0, "m": 0, "r": UNKNOWN_BACKEND_S * 1000}
        refused = ask(client)
        # It may pass when the running call ends, which is soon.
        assert refused.status_code == 429 and float(refused.headers["retry-after"]) < 60
        held.set()
        assert first.result().status_code == 200
        assert counters(stores, key_id) == {"d": 1000, "m": 1000, "r": 0}
        assert ask(client).status_code == 200


def test_a_client_that_leaves_frees_what_was_reserved(
    gateway: RunningGateway, held: threading.Event, stores: TestStores
) -> None:
    key = gateway.key(day_seconds=FAR)
    with gateway.http(key) as client, pytest.raises(httpx.ReadTimeout):
        client.post(NATIVE.path, json=NATIVE.body, timeout=0.2)
    until(lambda: counters(stores, key.split("_")[1])["r"] == 0)
    spent = counters(stores, key.split("_")[1])
    assert 100 < spent["d"] == spent["m"] < 5000


def test_redis_without_its_data_counts_again_from_the_audit(gateway: RunningGateway, stores: TestStores) -> None:
    key = gateway.key(name="mine", day_seconds=3, day=10**9)
    limit(gateway, "mine", "llama*", month_seconds=FAR)
    key_id = key.split("_")[1]
    with gateway.http(key) as client:
        assert [ask(client).status_code for _ in range(2)] == [200, 200]
        assert len(gateway.audit_rows()) == 2
        with stores.client() as redis:
            redis.flushall()
        assert [ask(client).status_code for _ in range(2)] == [200, 429]
    assert [counters(stores, name) for name in (key_id, f"{key_id}|llama*")] == [{"d": 3000, "m": 3000, "r": 0}] * 2


def test_a_limit_that_is_set_later_counts_what_was_spent_before(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(name="mine", day_seconds=FAR)) as client:
        assert ask(client).status_code == 200
        limit(gateway, "mine", day_seconds=UNLIMITED)
        until(lambda: ask(client).status_code == 200 and len(gateway.audit_rows()) >= 3)
        limit(gateway, "mine", day_seconds=3)
        until(lambda: ask(client).status_code == 429)
        assert len([row for row in gateway.audit_rows() if row["status"] == 200]) <= 4


def test_without_redis_each_process_enforces_its_share() -> None:
    counter_set = CounterSet("k", -1, -1, -1, -1, -1, 10, -1)
    ticket = Ticket("1", (counter_set,), "m", Need(1, 0), b"x", 2000)
    local = FallbackLimiter()
    local.note(counter_set, WindowUsage(0, 0, 0, 0), 0, 0, 0, 4000, 4000)
    # Half of the six seconds that are left.
    assert [local.admit(ticket, -1, Share(0, 2)) for _ in range(2)] == [None, None]
    refused = local.admit(ticket, -1, Share(0, 2))
    assert refused is not None and (refused.limit, refused.wait_s) == ("day_seconds", 0.0)
    held = admission.Admission("1", (counter_set,), "m", True, "local", seconds_ms=2000)
    local.settle(Settlement(held, 0, -1, b"", used_ms=500))
    local.settle(Settlement(held, 0, -1, b"", used_ms=500))
    assert local.admit(ticket, -1, Share(0, 2)) is None
    local.settle(Settlement(held, 0, -1, b"", used_ms=6000))
    spent = local.admit(ticket, -1, Share(0, 2))
    assert spent is not None and spent.wait_s and spent.wait_s <= 86_400
    assert local.admit(ticket._replace(info=b""), -1, Share(0, 2)) is None, "what takes no slot takes no seconds"


def test_what_was_counted_without_redis_is_delivered_once(gateway: RunningGateway, stores: TestStores) -> None:
    key = gateway.key(day_seconds=FAR)
    counter_set = CounterSet(key.split("_")[1], -1, -1, -1, -1, -1, FAR, -1)
    held = admission.Admission("x1", (counter_set,), "m", True, "local", seconds_ms=2000)
    with gateway.http(key) as client:
        assert ask(client).status_code == 200
    for _ in range(2):
        gateway.call(resend(gateway, Settlement(held, 0, -1, b"", id="x1", key_id=counter_set.name, used_ms=700)))
    assert counters(stores, counter_set.name) == {"d": 1700, "m": 1700, "r": 0}


async def resend(gateway: RunningGateway, settlement: Settlement) -> None:
    await gateway.components.limits.resend(settlement)


def test_a_call_whose_process_has_died_frees_what_it_reserved(gateway: RunningGateway, stores: TestStores) -> None:
    key = gateway.key(day_seconds=FAR)
    counter_set = CounterSet(key.split("_")[1], -1, -1, -1, -1, -1, FAR, -1)
    info = abandoned.call_info([counter_set], MODEL, 21, Record("y1", "y1", "POST").opening_fields(), 2000)
    ticket = Ticket("y1", (counter_set,), MODEL, Need(21, 0), info, 2000)
    gateway.call(gateway.components.limits._reply(ticket, may_wait=False, lease_ms=1))
    assert counters(stores, counter_set.name)["r"] == 2000
    settlement = abandoned.settlement_of("y1", b"0 " + info)
    assert settlement.admission is not None and settlement.admission.counter_sets == (counter_set,)
    with stores.client() as redis:
        # Another call is still running.
        redis.zadd(redis_keys.slots(counter_set.name), {"other": 2**50})
    gateway.call(resend(gateway, settlement))
    assert counters(stores, counter_set.name) == {"d": 0, "m": 0, "r": 0}


def test_an_estimate_is_the_mean_of_the_key_with_the_model_else_of_the_model() -> None:
    means, unlimited = Estimates(), CounterSet("a", -1, -1, -1, -1, -1)
    one, two, three = (CounterSet(name, -1, -1, -1, -1, -1, 10, -1) for name in ("one", "two", "three"))
    assert means.ms_to_reserve((unlimited,), "m") == 0
    assert means.ms_to_reserve((unlimited, one), "m") == UNKNOWN_BACKEND_S * 1000
    for _ in range(50):
        means.add_backend_seconds(one, "m", 2.0)
    means.add_backend_seconds(two, "m", 7.0)
    found = [means.ms_to_reserve((each,), "m") for each in (one, two)]
    assert found == [2000, 7000]
    assert means.ms_to_reserve((three,), "m") == 3000


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses"])
def test_other_dialects_get_the_same_refusal(gateway: RunningGateway, path: str) -> None:
    body = (
        {"model": MODEL, "max_tokens": 5, "messages": MESSAGES} if path == "/v1/messages" else {"model": MODEL, "input": "Hi"}
    )
    with gateway.http(gateway.key(day_seconds=1)) as client, gateway.http(gateway.key(day=0)) as other:
        assert ask(client).status_code == 200
        refused, like_tokens = client.post(path, json=body), other.post(path, json=body)
    assert (refused.status_code, like_tokens.status_code) == (429, 429)
    found, expected = refused.json()["error"], like_tokens.json()["error"]
    assert found["message"].startswith("Limit of 1 seconds of backends per day for this key reached; try again in ")
    assert {**found, "message": ""} == {**expected, "message": ""}
