"""The overview shows the fleet as it is: memory, loaded models, slots in use, queues, and who causes loads."""

import asyncio
import json
import time
from threading import Thread
from typing import Any

import jsonschema
import pytest

from gateway.admin import fleet_view, overview
from gateway.admin.fleet_view import FleetView
from gateway.auth.key import ADMIN
from gateway.core import strict_json
from gateway.dialects.model_entries import native_entry
from gateway.fleet import catalog as catalogs
from gateway.fleet.board_state import BoardState, PlaceState, QueueState
from gateway.fleet.catalog import Snapshot
from gateway.fleet.costs import Costs
from gateway.fleet.observation import Observation
from gateway.fleet.residents import BackendLoad, Loading, Resident
from gateway.pages.openapi import FOLDER
from gateway.stores.redis_client import RedisUnavailable
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import Memory
from tests.support.gateway_settings import entry_of
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}
MANY_BACKENDS, MANY_MODELS = 50, 1000


def seen_by(gateway: RunningGateway) -> dict[str, Any]:
    with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
        found: dict[str, Any] = admin.get("/admin/v1/overview").json()
    shapes = strict_json.read_loosely((FOLDER / "schemas.json").read_bytes())
    schema = {"$ref": "#/components/schemas/Overview", "components": {"schemas": shapes["schemas"]}}
    jsonschema.Draft202012Validator(schema).validate(found)
    return found


def test_a_fleet_at_work(start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overview, "CACHED_S", 0.0)
    alpha.healthy.memory = Memory()
    alpha.healthy.pause_s = 0.2
    with FakeBackend("openai", ["vllm"], name="gamma") as gamma:
        gateway = start_gateway(entry_of(alpha, slots=2), gamma, ROUTING="warm")
        key = gateway.key(name="alice", concurrent=10)

        def ask() -> None:
            with gateway.http(key) as client:
                assert client.post("/api/chat", json=CHAT).status_code == 200

        threads = [Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: gateway.components.placing.queue.length == 1 and alpha.in_flight == 2, 5)
        found = seen_by(gateway)
        [queue] = found["queues"]
        assert (found["waiting_for_backends"], queue["model"], queue["calls"]) == (1, MODEL, 1)
        assert queue["tokens"] > 0 and queue["last_s"] >= queue["first_s"] > 0
        rows = {row["name"]: row for row in found["backends"]}
        [place] = rows["alpha"]["places"]
        assert (place["model"], place["slots"], place["in_use"]) == (MODEL, 2, 2)
        [always] = rows["gamma"]["places"]
        assert (always["model"], always["is_loaded"], always["in_use"]) == ("vllm:latest", True, 0)
        assert rows["gamma"]["memory"] is None and rows["gamma"]["loading"] is None
        alpha.healthy.pause_s = 0.0
        for thread in threads:
            thread.join(10)
        gateway.loop.call_soon_threadsafe(gateway.components.load.look_soon, "alpha")
        gateway.audit_rows()
        until(lambda: seen_by(gateway)["backends"][0]["memory"]["used"] > 0, 5)
        found = seen_by(gateway)
        row = found["backends"][0]
        assert (found["waiting_for_backends"], found["queues"], row["running"]) == (0, [], [MODEL])
        [place] = row["places"]
        assert (place["is_loaded"], place["in_use"], place["left_s"]) == (True, 0, None)
        assert row["memory"]["used"] == row["memory"]["seen"] == place["vram"] > 0
        assert (row["lately"]["requests"], row["lately"]["loads"]) == (3, found["lately"]["loads"]) and row["lately"][
            "loads"
        ] >= 1
        [loading] = found["lately"]["loading_keys"]
        assert (loading["key"], loading["loads"], loading["model"]) == ("alice", row["lately"]["loads"], MODEL)
        assert found["lately"]["waited"] == 1 and found["lately"]["wait_p50_ms"] > 0


def test_without_redis_what_waits_is_unknown(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(_: object, **more: object) -> None:
        raise RedisUnavailable

    monkeypatch.setattr("gateway.fleet.board.Board.state", away)
    gateway = start_gateway(alpha)
    until(lambda: "alpha" in gateway.components.load.known, 5)
    found = seen_by(gateway)
    assert (found["waiting_for_backends"], found["queues"]) == (None, None)
    assert [place["in_use"] for place in found["backends"][0]["places"]] == [None]


def snapshot(name: str, models: int) -> Snapshot:
    entries = tuple(native_entry({"name": f"m{number}", "size": 10**9}) for number in range(models))
    return Snapshot(name, "http://x", "ollama", answered_at=time.time(), models=entries)


def test_a_large_fleet_is_described_quickly_and_in_few_bytes() -> None:
    names = [f"backend-{number}" for number in range(MANY_BACKENDS)]
    catalog = catalogs.build([snapshot(name, 20 if number else MANY_MODELS) for number, name in enumerate(names)], 60.0)
    now = time.time()
    residents = tuple(Resident(f"m{number}:latest", 10**9, 10**9, 4096, now, now, now + 60) for number in range(8))
    loads = {name: BackendLoad(name, True, residents, 10**10, loading=Loading("m9:latest", now - 2, now + 5)) for name in names}
    costs = Costs()
    for name in names:
        costs.note(name, "m1:latest", Observation(1.0, 0.5, 100, 10))
    queues = tuple(QueueState(f"m{number}:latest", 5, 100, 1.0, 2.0, 3.0) for number in range(MANY_MODELS))
    places = tuple(PlaceState(name, f"m{number}:latest", 3, 1.0) for name in names for number in range(4, 12))

    async def state() -> BoardState:
        return BoardState(queues, places)

    view = FleetView(lambda: catalog, lambda: loads, costs, state)
    asyncio.run(view.now())
    began = time.process_time()
    seen = asyncio.run(view.now())
    rows, shown = [seen.of(name) for name in names], seen.queues()
    took_s = time.process_time() - began
    assert took_s < 0.1 and len(json.dumps([rows, shown])) < 200_000
    assert seen.waiting == 5 * MANY_MODELS and len(shown or ()) == fleet_view.MOST_QUEUES
    row = rows[0]
    assert [place["model"] for place in row["places"]][:2] == ["m4:latest", "m5:latest"], "those with calls come first"
    assert len(row["places"]) == 12 and row["memory"]["used"] == 8 * 10**9
    assert row["loading"] == {"model": "m9:latest", "for_s": pytest.approx(2, abs=1), "left_s": pytest.approx(5, abs=1)}
    learned = {place["model"]: place["decode_tps"] for place in row["places"]}
    assert learned["m1:latest"] and learned["m4:latest"] is None


def test_a_load_that_is_done_is_shown_as_loaded() -> None:
    now = time.time()
    load = BackendLoad("a", True, (Resident("m:latest", 1, 1),), 1, loading=Loading("m:latest", now, now + 5))

    async def state() -> BoardState:
        return BoardState()

    seen = asyncio.run(FleetView(catalogs.Catalog, lambda: {"a": load}, Costs(), state).now())
    assert seen.of("a")["loading"] is None and seen.of("unknown")["places"] == []
