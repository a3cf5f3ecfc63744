"""What llama.cpp's servers report of themselves is used; what other servers have at the same paths is not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gateway.dialects.model_names import canonical
from gateway.fleet.catalog import Offer, Snapshot
from gateway.fleet.llama_server import RoutedModel, read_router
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever, Script, answer
from tests.support.gateway_settings import entry_of
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

PROPS = "/props"
TOKEN = "llama-secret"
pytestmark = pytest.mark.usual_slots


@pytest.fixture
def llama() -> Iterator[FakeBackend]:
    with FakeBackend("openai", ["gemma.gguf"], name="llama", token=TOKEN) as backend:
        yield backend


def offer(gateway: RunningGateway, model: str) -> Offer:
    return gateway.components.catalog().models[canonical(model).canonical].offers[0]


def snapshot(gateway: RunningGateway) -> Snapshot:
    return gateway.components.catalog().snapshots[0]


def guarded(healthy: Script) -> Callable[..., Any]:
    """A path that needs the token."""
    return lambda request: healthy if request.header("authorization") == f"Bearer {TOKEN}" else answer(401, {"error": {}})


def test_slots_are_asked_for_with_the_token_and_again_by_a_refresh(start_gateway: StartGateway, llama: FakeBackend) -> None:
    llama.play(PROPS, guarded(answer(200, {"total_slots": 4, "chat_template": "x" * 100_000})))
    gateway = start_gateway(entry_of(llama, auth_token=TOKEN))
    found = offer(gateway, "gemma.gguf")
    assert (found.slots, found.slots_source, found.swaps) == (4, "reported", False)
    llama.play(PROPS, answer(200, {"total_slots": 2}))
    gateway.call(gateway.components.discovery.refresh())
    assert offer(gateway, "gemma.gguf").slots == 4, "they are asked for with the paths"
    gateway.call(gateway.components.discovery.refreshed())
    assert offer(gateway, "gemma.gguf").slots == 2
    llama.play(PROPS, answer(503, {"error": {"message": "Loading model"}}))
    gateway.call(gateway.components.discovery.refreshed())
    assert offer(gateway, "gemma.gguf").slots == 2, "while it does not answer, what was known holds"


def test_slots_behind_a_path_prefix(start_gateway: StartGateway, llama: FakeBackend) -> None:
    llama.healthy.token = None
    llama.play("/gpu/v1/models", answer(200, {"object": "list", "data": [{"id": "gemma.gguf"}]}))
    llama.play("/gpu/props", answer(200, {"total_slots": 3}))
    gateway = start_gateway({**entry_of(llama), "base_url": f"{llama.url}/gpu"})
    assert offer(gateway, "gemma.gguf").slots == 3


@pytest.mark.parametrize(
    "props",
    [
        pytest.param(answer(404, {"detail": "Not Found"}), id="vLLM"),
        pytest.param(answer(200, {"error": "Unexpected endpoint or method. (GET /props)"}), id="LM Studio"),
        pytest.param(answer(200, b"<html>", "text/html"), id="a page"),
        pytest.param(answer(200, [1, 2]), id="a list"),
        pytest.param(answer(200, {"total_slots": "4"}), id="text"),
        pytest.param(answer(200, {"total_slots": -1}), id="negative"),
        pytest.param(answer(200, {"total_slots": True}), id="boolean"),
        pytest.param(answer(200, b"[" * 2_000_000), id="nested"),
        pytest.param(answer(200, {"x": "y" * 3_000_000}), id="long"),
        pytest.param(answer(401, {"error": "no"}), id="refused"),
    ],
)
def test_other_answers_are_no_slots(start_gateway: StartGateway, llama: FakeBackend, props: Script) -> None:
    llama.healthy.token = None
    llama.play(PROPS, props)
    found = offer(start_gateway(llama), "gemma.gguf")
    assert (found.slots, found.slots_source) == (32, "default")


def test_a_path_that_never_answers_delays_nothing(
    start_gateway: StartGateway, llama: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.fleet.llama_server.DEADLINE_S", 0.3)
    llama.healthy.token = None
    llama.play(PROPS, [Forever()])
    gateway = start_gateway(llama)
    assert offer(gateway, "gemma.gguf").slots == 32
    until(lambda: snapshot(gateway).routes_at > 0, 5)


def routed(name: str, value: str, *arguments: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "owned_by": "llamacpp", "status": {"value": value, "args": [*arguments]}, **more}


ROUTER = {
    "object": "list",
    "data": [
        routed("Org/Gemma-GGUF:Q4", "loaded", "llama-server", "--parallel", "2", meta={"size": 5_000, "n_ctx": 4096}),
        routed("qwen", "unloaded", "-np", "-1", "--parallel"),
        routed("sleepy", "sleeping", "-np", "1"),
    ],
}


def test_a_router_loads_and_unloads_and_has_slots_by_model(start_gateway: StartGateway, llama: FakeBackend) -> None:
    llama.healthy.token = None
    llama.play("/v1/models", answer(200, ROUTER))
    gateway = start_gateway(llama)
    found = [offer(gateway, name) for name in ("org/gemma-gguf:q4", "qwen", "sleepy")]
    assert [(one.slots, one.slots_source, one.swaps) for one in found] == [(2, "reported", True)] + [
        (slots, "reported", True) for slots in (4, 1)
    ]
    assert not llama.calls(PROPS), "that of a router has no slots"
    llama.play("/v1/models", None)
    llama.play(PROPS, answer(200, {"total_slots": 8}))
    gateway.call(gateway.components.discovery.refreshed())
    assert (offer(gateway, "gemma.gguf").slots, offer(gateway, "gemma.gguf").swaps) == (8, False)


def test_models_of_a_router() -> None:
    assert read_router(ROUTER) == {
        "org/gemma-gguf:q4": RoutedModel(True, 2, 5_000, 4096, "loaded"),
        "qwen:latest": RoutedModel(False, 4, 0, 0, "unloaded"),
        "sleepy:latest": RoutedModel(False, 1, 0, 0, "sleeping"),
    }


@pytest.mark.parametrize(
    "answered",
    [
        None,
        [],
        {"data": {}},
        {"data": [None, 1, {"id": 3}, {"id": "m"}, {"id": "m", "status": "loaded"}, {"id": "m", "status": {"value": 1}}]},
        {"data": [{"id": "m", "status": {"value": ["loaded"]}}]},
    ],
)
def test_lists_of_other_servers_are_no_router(answered: Any) -> None:
    assert read_router(answered) == {}


@pytest.mark.parametrize(
    "arguments", [None, "--parallel 3", ["--parallel"], ["-np", 3], ["-np", "0"], ["-np", "x"], ["-np", "9" * 30], [{}, []]]
)
def test_a_command_line_without_slots_has_the_usual_ones(arguments: Any) -> None:
    entry = {"id": "m", "status": {"value": "loaded", "args": arguments}, "meta": [1]}
    assert read_router({"data": [entry]}) == {"m:latest": RoutedModel(True, 4, 0, 0, "loaded")}
