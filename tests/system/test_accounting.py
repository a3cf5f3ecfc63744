"""The accounts balance: each authenticated request has one audit row, each token is counted once, no slot stays occupied."""

import asyncio
import os
import random
from collections import Counter
from typing import Any

import pytest

from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import billed
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS, How, Received, Script, Step, cut_at, recording
from tests.support.random_clients import RandomClients, run_clients
from tests.support.running_gateway import RunningGateway

REQUESTS = int(os.environ.get("CONSERVATION_REQUESTS", "1500"))


def unreliable(backend: FakeBackend, rng: random.Random) -> Script:
    """Healthy most of the time; otherwise it fails before, within or after its first frame."""
    faults = [name for name in FAULTS if "timeout" not in name and "silent" not in name]

    def script(request: Received) -> list[Step]:
        if rng.random() < 0.75:
            return list(backend.healthy(request))
        is_native = request.path.startswith("/api/")
        dialect, streamed = ("ollama" if is_native else "openai"), bool(request.json["stream"])
        if rng.random() < 0.5:
            return FAULTS[rng.choice(faults)](dialect, streamed)  # type: ignore[arg-type]
        name = f"{dialect}_chat_{'stream' if streamed else 'whole'}"
        data = recording(f"{name}.json" if not streamed else f"{name}.ndjson" if is_native else f"{name}.sse")
        kind = "application/json" if not streamed else "application/x-ndjson" if is_native else "text/event-stream"
        how: How = "reset" if rng.random() < 0.5 else "close"
        return cut_at(data, rng.randrange(len(data)), how, kind)

    return script


def leases_left(stores: TestStores) -> list[bytes]:
    with stores.client() as redis:
        return [name for kind in ("c", "v", "q") for name in redis.scan_iter(f"nz:*:{kind}:*")] + [
            name for shared in redis_keys.BY_SHARD for name in (shared.calls, shared.leases) if redis.exists(name)
        ]


def seconds_reserved(stores: TestStores) -> int:
    with stores.client() as redis:
        return sum(int(redis.hget(name, "r") or 0) for name in redis.scan_iter("nz:*:s:*"))


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    rng = random.Random(11)
    for backend in (alpha, beta):
        backend.healthy.pieces, backend.healthy.pause_s = 5, 0.002
        backend.healthy.cached = lambda _: rng.choice([0, 1, 2, 2, 7, 10**12, -1, 1.5, True, "2", None])
        for path in ("/api/chat", "/v1/chat/completions"):
            backend.play(path, unreliable(backend, rng))
    return start_gateway(alpha, beta)


def test_random_disconnects_and_failures_keep_the_accounts_balanced(gateway: RunningGateway, stores: TestStores) -> None:
    clients = RandomClients(gateway.key(day=10**12, day_seconds=10**9), random.Random(5))
    asyncio.run(run_clients(clients, [gateway.url], REQUESTS, 60))
    gateway.wait_idle(20)
    rows = gateway.audit_rows()
    lines = gateway.request_lines()
    assert clients.sent == REQUESTS == len(rows) == len(lines)
    assert len({row["id"] for row in rows}) == len(rows)
    assert leases_left(stores) == [] and gateway.components.limits.admitted == 0
    assert sum(map(billed, rows)) == stores.billed_today() > 0
    assert sum(round(row["backend_ms"] or 0) for row in rows) == stores.billed_today("s") > 0
    assert {row["seconds_from"] for row in rows} == {"reported", "slot", "none"} and seconds_reserved(stores) == 0
    discounted = {(row["dialect"], row["stream"]) for row in rows if row["billed_tokens"] is not None}
    assert discounted == {(dialect, stream) for dialect in ("ollama", "openai") for stream in (True, False)}
    outcomes = Counter(row["outcome"] for row in rows)
    assert {"answered", "client_gone", "backend_failed", "truncated"} <= set(outcomes), outcomes
    usual = {"answered", "client_gone", "backend_failed", "truncated", "refused"}
    assert {name.partition(":")[0] for name in outcomes} <= usual
    answered = {row["request_id"] for row in rows if row["outcome"] == "answered"}
    assert clients.whole <= answered and clients.ends["cut"] == 0
    by_log = Counter(line["outcome"] for line in lines)
    assert by_log == outcomes


def test_a_row_records_what_happened(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    gateway = start_gateway(alpha, beta)
    alpha.play("/api/chat", FAULTS["500"]("ollama", True))
    with gateway.http(gateway.key(name="mine"), headers={"User-Agent": "trial/1", "X-Request-ID": "my-own"}) as client:
        got = client.post("/api/chat", json={"model": "LLAMA3.2", "messages": [{"role": "user", "content": "Hi"}]})
    (row,) = gateway.audit_rows()
    assert (row["request_id"], row["agent"], row["client"]) == ("my-own", "trial/1", "127.0.0.1")
    assert (row["dialect"], row["method"], row["route"], row["model"]) == ("ollama", "POST", "/api/chat", "LLAMA3.2")
    assert '"fault": "bad_status"' in row["attempts"] and '"backend": "alpha"' in row["attempts"]
    assert (row["backend"], row["answered_as"], row["status"], row["outcome"]) == ("beta", "llama3.2:latest", 200, "answered")
    assert (row["stream"], row["tokens_from"], row["bytes_out"]) == (True, "reported", len(got.content))
    assert row["prompt_tokens"] == 1 and row["completion_tokens"] == 4 and row["bytes_in"] > 50
    assert 0 < row["ttfb_ms"] < row["total_ms"] < 5000


def test_unauthenticated_requests_have_no_row(gateway: RunningGateway) -> None:
    with gateway.http("nz_wrong") as stranger, gateway.http() as nobody:
        assert [client.get("/api/tags").status_code for client in (stranger, nobody)] == [401, 401]
    assert gateway.audit_rows() == []


def rows_by_outcome(gateway: RunningGateway) -> dict[str, Any]:
    return {row["outcome"]: row for row in gateway.audit_rows()}


def test_refusals_have_rows(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key("llama*")) as client:
        client.post("/api/chat", content=b"{")
        client.post("/api/chat", json={"model": "other", "messages": []})
        client.post("/api/pull", json={"model": "other"})
    assert set(rows_by_outcome(gateway)) == {
        "refused:bad_request",
        "refused:model_not_available",
        "refused:insufficient_permissions",
    }
