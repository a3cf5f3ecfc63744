"""What an explanation says of slots, the queue and the estimate is what the next call meets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gateway.auth.key import ADMIN
from gateway.fleet.caller import NO_KEY_SLOT
from gateway.fleet.catalog import Model
from gateway.fleet.claim import Claim
from gateway.fleet.scheduler import Candidate
from gateway.fleet.slot import Slot
from gateway.stores.redis_client import RedisUnavailable
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import Memory
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of, environment_for
from tests.support.processes import operate, until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}


def explained(gateway: RunningGateway, **more: Any) -> dict[str, Any]:
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
        answer = admin.get("/admin/v1/explain", params={"key": "alice", "model": MODEL, **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def estimates(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["backend"]: row["estimate"] for row in found["backends"]}


@contextmanager
def calls_in_progress(gateway: RunningGateway, *backends: str) -> Iterator[None]:
    """Each holds a slot of its backend."""
    placing, model = gateway.components.placing, gateway.components.catalog().models[MODEL]
    slots = [gateway.call(_slot(placing, model, gateway.components.backends[name])) for name in backends]
    try:
        yield
    finally:
        for slot in slots:
            gateway.loop.call_soon_threadsafe(slot.free)
        until(lambda: not placing.queue.running, 5)


async def _slot(placing: Any, model: Model, backend: Any) -> Slot:
    offer = next(offer for offer in model.offers if offer.backend == backend.name)
    place = placing.claims._place(Candidate(backend, offer), 100)
    claim = Claim(f"busy at {backend.name} {placing.queue.running}", MODEL, "somebody", [place], patience_ms=10_000)
    found: Slot = await placing.queue.get(claim, lambda: claim, NO_KEY_SLOT, lambda queued: None)
    return found


def test_the_forecast_is_what_the_next_call_meets(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    fleet = [entry_of(backend, slots=1, tier=1) for backend in (alpha, beta)]
    gateway = start_gateway(*fleet, ROUTING="fast", QUEUE_SIZE="1")
    key = gateway.key(name="alice", flags=("show_backend",))
    with gateway.http(key) as client:
        for busy, backend in (((), "alpha"), (("alpha",), "beta"), (("beta",), "alpha")):
            with calls_in_progress(gateway, *busy):
                found = explained(gateway, prompt=500, output=10)
                routing = found["routing"]
                assert (found["status"], found["backend"], routing["backend"], routing["position"]) == (
                    200,
                    backend,
                    backend,
                    0,
                )
                assert {name: (one["running"], one["can_begin"]) for name, one in estimates(found).items()} == {
                    name: (int(name in busy), name not in busy) for name in ("alpha", "beta")
                }
                another = {**CHAT, "messages": [{"role": "user", "content": f"Hello, {busy}"}]}
                happened = client.post("/api/chat", json=another).headers
                assert (happened["x-gateway-backend"], happened["x-queue-position"]) == (backend, "0")
                assert happened["x-gateway-chosen"] == routing["chosen_because"]
        with calls_in_progress(gateway, "alpha", "beta"):
            found = explained(gateway)
            assert (found["status"], found["routing"]["position"], found["routing"]["waiting"]) == (200, 1, 0)
            assert found["routing"]["first_token_s"] >= found["routing"]["wait_s"] > 0
            waiting = Thread(target=client.post, args=("/api/chat",), kwargs={"json": CHAT})
            waiting.start()
            until(lambda: gateway.components.placing.queue.length == 1, 5)
            found = explained(gateway)
            assert (found["status"], found["outcome"]) == (503, "queue_full")
            assert (found["routing"]["waiting"], found["routing"]["position"]) == (1, 2)
            with gateway.http(key) as other:
                assert other.post("/api/chat", json=CHAT).json()["error"].startswith("As many requests wait")
        waiting.join(10)


def test_each_term_is_there_and_adds_up(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    alpha.healthy.memory, beta.healthy.memory = Memory(), Memory()
    gateway = start_gateway(*(entry_of(backend, tier=1) for backend in (alpha, beta)), ROUTING="fast")
    gateway.key(name="alice")
    until(lambda: gateway.components.load.known.keys() == {"alpha", "beta"}, 5)
    found = explained(gateway, prompt=4000)
    assert found["routing"]["mode"] == "fast" and found["routing"]["decided_by"] == "Redis"
    for terms in estimates(found).values():
        parts = [terms[f"{name}_s"] for name in ("load", "evict", "block", "queue", "prefill")]
        assert terms["total_s"] == pytest.approx(sum(parts)) and parts[0] > 0 and parts[-1] == pytest.approx(4.0, rel=0.01)
        assert (terms["tier"], terms["running"], terms["cached_tokens"], terms["why"]) == (1, 0, 0, "load")
    without_slots = explained(gateway, client="/v1/messages/count_tokens")
    assert without_slots["routing"] is None and estimates(without_slots) == {"alpha": None, "beta": None}


def test_without_redis_what_this_process_knows_is_shown(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start_gateway(*(entry_of(backend, slots=2) for backend in (alpha, beta)))
    gateway.key(name="alice")

    async def away(_: object) -> None:
        raise RedisUnavailable

    monkeypatch.setattr(gateway.components.placing.queue.board, "preview", away)
    with calls_in_progress(gateway, "alpha", "alpha"):
        found = explained(gateway)
    assert (found["status"], found["backend"]) == (200, "beta")
    assert "Redis is unreachable" in found["routing"]["decided_by"]
    assert {name: (one["running"], one["can_begin"], one["queue_s"]) for name, one in estimates(found).items()} == {
        "alpha": (2, False, None),
        "beta": (0, True, None),
    }


def test_a_copy_that_is_left_out_because_it_differs_is_named(start_gateway: StartGateway) -> None:
    with FakeBackend(name="alpha") as alpha, FakeBackend(name="beta") as beta:
        for backend, digest in ((alpha, "a"), (beta, "b")):
            backend.play("/api/tags", answer(200, {"models": [{"name": MODEL, "digest": digest * 64}]}))
        gateway = start_gateway(alpha, beta, DIGEST_PARITY="distinct", MODEL_ALIASES=f'{{"mini": "{MODEL}"}}')
        gateway.key(name="alice")
        for model in (MODEL, "mini"):
            rows = {row["backend"]: row["why"] for row in explained(gateway, model=model)["backends"]}
            copy = "aaaaaaaaaaaa as on alpha (DIGEST_PARITY=distinct)"
            assert rows == {"alpha": "ready", "beta": f"its copy of {MODEL} differs: bbbbbbbbbbbb, not {copy}"}


def test_the_command_prints_words_and_a_table(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, stores: TestStores, tmp_path: Path
) -> None:
    fleet = [entry_of(backend, slots=1, tier=1) for backend in (alpha, beta)]
    gateway = start_gateway(*fleet, ROUTING="fast")
    gateway.key(name="alice")
    # The gateway's rule counts, not that of the command.
    names = environment_for(*fleet, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, ROUTING="order")
    states = gateway.components.store
    until(lambda: bool(gateway.call(states.call(lambda redis: redis.hlen("nz:{0}:bulletin")))), 5)
    asked = ("explain", "--key", "alice", "--model", MODEL, "--prompt", "3000", "--output", "20")
    printed = operate(tmp_path, names, *asked).splitlines()
    assert printed[0].startswith("would go to alpha now: it has the model loaded; first token in about 3.")
    assert "ROUTING=fast; no call waits for this model" in printed
    begin = next(number for number, line in enumerate(printed) if line.startswith("TRY"))
    head, first, second = (line.split() for line in printed[begin : begin + 3])
    names_of_columns = "TRY BACKEND TIER SLOTS NOW LOAD EVICT BLOCK QUEUE PREFILL CACHED TOTAL PENALTY AS WHY"
    assert head == names_of_columns.split()
    assert (first[:5], first[9:11], first[13:15]) == (["1", "alpha", "1", "0/1", "yes"], ["3.0", "0"], ["loaded", "ready"])
    assert second[:5] == ["2", "beta", "1", "0/1", "yes"]
    with calls_in_progress(gateway, "alpha", "beta"):
        printed = operate(tmp_path, names, *asked).splitlines()
    assert printed[0].startswith("would wait about ") and ", place 1, for alpha: it has the model loaded" in printed[0]
    print("\n".join(printed))
    with pytest.raises(AssertionError, match="is not a number of tokens: write a whole number from 0"):
        operate(tmp_path, names, *asked, "--prompt", "many")


def test_the_command_says_that_redis_is_unreachable(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, tmp_path: Path
) -> None:
    start_gateway(alpha).key(name="alice")
    names = environment_for(entry_of(alpha, slots=3), DATABASE_URL=stores.database_url, REDIS_URL="redis://127.0.0.1:1")
    printed = operate(tmp_path, names, "explain", "--key", "alice", "--model", MODEL)
    assert printed.startswith("would go to alpha now: ") and "running processes: unknown, Redis is unreachable" in printed
    assert "ROUTING=order; slots and queue are those of this process alone: Redis is unreachable\n" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("1 "))
    assert row[:5] == ["1", "alpha", "1", "0/3", "yes"] and row[6:9] == ["-", "-", "-"]
