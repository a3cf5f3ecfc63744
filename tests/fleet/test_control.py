"""Commands for a gateway that has its backends from its own environment: it carries them out, or they fail with the reason."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from gateway.core.errors import CommandFailed
from gateway.fleet import control, jobs, presence
from gateway.ops import main
from gateway.ops.doctor import report
from gateway.stores import redis_keys
from gateway.stores.redis_client import RedisClient
from tests.conftest import StartGateway, TestStores
from tests.ops.test_serve import home
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import NDJSON, Forever, ndjson, stream
from tests.support.gateway_settings import entry_of, settings_for
from tests.support.processes import serving, until
from tests.support.running_gateway import RunningGateway

__all__ = ["home"]
TOKEN = "a-token-of-a-backend"


@pytest.fixture
def guarded() -> Iterator[FakeBackend]:
    with FakeBackend(models=["qwen3:8b"], name="guarded", token=TOKEN) as backend:
        yield backend


@pytest.fixture
def operate(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a verb in the folder of the gateway, without its environment; returns the JSON."""

    def operate(*words: str) -> Any:
        monkeypatch.chdir(home)
        capsys.readouterr()
        assert main.main([*words, "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return operate


def test_commands_are_carried_out_by_a_local_run(
    home: Path, operate: Callable[..., Any], guarded: FakeBackend, alpha: FakeBackend
) -> None:
    entries = json.dumps([entry_of(guarded, auth_token=TOKEN), entry_of(alpha)])
    with serving(home, {"OLLAMA_BACKENDS": entries}, "run") as (_, _, log):
        until(lambda: "Ctrl-C" in log.read_text(), 20)
        models = operate("models")
        assert [(row["backend"], row["model"], row["state"]) for row in models["backends"]] == [
            ("guarded", "qwen3:8b", "up"),
            ("alpha", "llama3.2:latest", "up"),
        ]
        asked = ("explain", "--key", "local", "--model", "qwen3:8b", "--client", "ollama")
        answer = operate(*asked)
        assert (answer["status"], answer["backend"], len(answer["backends"]), answer["processes"]) == (200, "guarded", 2, 1)
        guarded.healthy.models.append("new:latest")
        refreshed = operate("refresh")
        assert [(row["backend"], row["models"]) for row in refreshed] == [("guarded", 2), ("alpha", 1)]
        probed = operate("probe")
        assert [(row["backend"], row["token"], row["problem"]) for row in probed] == [
            ("guarded", "accepted", None),
            ("alpha", "none needed", None),
        ]
        operate("drain", "--backend", "guarded")
        answer = operate(*asked)
        assert answer["status"] == 503 and "drained" in answer["backends"][0]["why"]


def until_published(gateway: RunningGateway, processes: int) -> None:
    """Waits until this many processes have published their state, as each does every second."""
    until(lambda: len(gateway.call(presence.read(gateway.components.store))) == processes, 10)


def test_no_token_is_published(start_gateway: StartGateway, guarded: FakeBackend, stores: TestStores) -> None:
    gateway = start_gateway(entry_of(guarded, auth_token=TOKEN))
    until_published(gateway, 1)
    own = settings_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url).backends
    fleet = gateway.call(control.other_fleet(gateway.components.store, own))
    assert fleet is not None and [(one["name"], one["has_token"]) for one in fleet] == [("guarded", True)]
    [row] = gateway.call(control.ask(gateway.components.store, fleet, "probe"))
    assert row["token"] == "accepted"
    with stores.client() as client:
        for name in client.scan_iter():
            held = client.hgetall(name) if client.type(name) == b"hash" else client.dump(name)
            assert TOKEN not in str(held), name


def test_gateways_with_different_backends(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, stores: TestStores
) -> None:
    """As while OLLAMA_BACKENDS changes gateway by gateway: the one with these settings is asked; without one, commands fail."""
    gateway = start_gateway(alpha)
    other = settings_for(beta, REDIS_URL=stores.redis_url)
    until_published(gateway, 1)
    [warned] = asyncio.run(report._running(other))
    assert warned.state == "warning" and "have other backends than these settings: alpha at" in warned.found
    start_gateway(alpha, beta)
    until_published(gateway, 2)
    store = gateway.components.store
    of_one, of_none = settings_for(alpha).backends, settings_for(beta).backends
    assert gateway.call(control.other_fleet(store, of_one)) is None
    with pytest.raises(
        CommandFailed, match=r"these settings have beta at \S+, the running gateways alpha at .*; alpha at .*, b"
    ):
        gateway.call(control.other_fleet(store, of_none))


async def followed(gateway: RunningGateway, fleet: control.FleetFacts, job: str, **arguments: Any) -> list[jobs.Rows]:
    return [rows async for rows in control.follow(gateway.components.store, fleet, job, arguments)]


def fleet_of(gateway: RunningGateway) -> control.FleetFacts:
    return presence.described(backend.config for backend in gateway.components.backends.values())


def test_jobs_are_done_by_a_running_gateway(start_gateway: StartGateway, guarded: FakeBackend) -> None:
    gateway = start_gateway(entry_of(guarded, auth_token=TOKEN))
    fleet = fleet_of(gateway)
    [row] = gateway.call(followed(gateway, fleet, "pull", model="new"))[-1]
    assert (row["backend"], row["state"], row["percent"]) == ("guarded", "done", 100.0)
    assert "new:latest" in gateway.components.discovery.catalog.models
    [row] = gateway.call(followed(gateway, fleet, "warm", model="new", backend="guarded"))[-1]
    assert row["detail"] == "was loaded"
    with pytest.raises(CommandFailed, match="there is no backend 'omega': write one of guarded"):
        gateway.call(followed(gateway, fleet, "unload", model="new", backend="omega"))
    with pytest.raises(CommandFailed, match="the model must be a string"):
        gateway.call(followed(gateway, fleet, "pull", model=["new"]))


def test_a_job_ends_when_its_operator_leaves(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    record = {"status": "pulling aa", "digest": "sha256:aa", "total": 4, "completed": 1}
    alpha.play("/api/pull", [*stream(ndjson([record]), NDJSON)[:-1], Forever()])
    gateway = start_gateway(alpha)
    fleet, store = fleet_of(gateway), gateway.components.store

    async def leave() -> jobs.Rows:
        async with aclosing(control.follow(store, fleet, "pull", {"model": "new"})) as progress:
            async for rows in progress:
                if rows[0]["percent"] == 25.0:
                    return rows
        raise AssertionError

    assert gateway.call(leave())[0]["state"] == "running"
    assert alpha.wait_idle() and alpha.calls("/api/pull")[0].outcome == "client_left"


def test_a_gateway_that_stops_ends_its_jobs(start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores) -> None:
    alpha.play("/api/pull", [Forever()])
    gateway = start_gateway(alpha)
    fleet = fleet_of(gateway)

    async def follow() -> None:
        async with RedisClient(stores.redis_url) as store:
            async for rows in control.follow(store, fleet, "pull", {"model": "new"}):
                if rows[0]["seconds"] >= 0:
                    gateway.loop.call_soon_threadsafe(gateway.server.begin_drain)

    with pytest.raises(CommandFailed, match="shutting down: try again"):
        asyncio.run(follow())
    assert alpha.wait_idle()


def test_a_gateway_that_does_not_answer(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages that are no commands are ignored, too."""
    gateway = start_gateway(alpha)
    until_published(gateway, 1)
    store = gateway.components.store
    fleet = gateway.call(control.other_fleet(store, settings_for({**entry_of(alpha), "name": "other"}).backends))
    assert fleet is not None
    for nonsense in ("", "[]", '{"id":1}', json.dumps({"id": "a" * 32, "act": ["x"], "fleet": fleet})):
        with stores.client() as client:
            client.publish(redis_keys.CONTROL, nonsense)
    monkeypatch.setattr(control, "WAIT_S", 0.3)
    with pytest.raises(CommandFailed, match="did not answer within"):
        gateway.call(control.ask(store, fleet, "unheard-of"))
    with pytest.raises(CommandFailed, match="did not answer within"):
        gateway.call(followed(gateway, fleet, "unheard-of"))
    monkeypatch.setattr(control, "WAIT_S", 30.0)
    assert [row["models"] for row in gateway.call(control.ask(store, fleet, "refresh"))] == [1]
