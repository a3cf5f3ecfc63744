"""Which paths a backend has is found out without generating, from what real servers answer."""

import time
from collections.abc import Iterator

import pytest

from gateway.fleet import routes
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Forever, answer
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

JSON, TEXT = "application/json", "text/plain; charset=utf-8"
MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"


@pytest.mark.parametrize(
    ("server", "status", "content_type", "has"),
    [
        ("Ollama: model is required", 400, "application/json; charset=utf-8", True),
        ("Ollama without the path", 404, TEXT, False),
        ("llama.cpp: 'messages' is required", 500, "application/json; charset=utf-8", True),
        ("llama.cpp without the path", 404, "application/json; charset=utf-8", False),
        ("llama.cpp started without the model for it", 501, JSON, False),
        ("vLLM: a field is missing", 400, JSON, True),
        ("vLLM before that: a field is missing", 422, JSON, True),
        ("vLLM without the path", 404, JSON, False),
        ("LM Studio, to any unknown path", 200, JSON, False),
        ("a proxy whose server is away", 502, "text/html", None),
        ("a wrong token", 401, JSON, None),
        ("a busy server", 503, JSON, None),
        ("a page", 500, "text/html", False),
    ],
)
def test_what_servers_answer(server: str, status: int, content_type: str, has: bool | None) -> None:
    assert routes.verdict(status, content_type) is has, server


@pytest.fixture
def alpha() -> Iterator[FakeBackend]:
    with FakeBackend(name="alpha", is_native=True) as backend:
        yield backend


def known(gateway: RunningGateway) -> tuple[str, ...]:
    (snapshot,) = gateway.components.catalog().snapshots
    return snapshot.routes


def test_paths_of_a_server_that_answers_late_are_asked_for_again(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    alpha.play(MESSAGES, answer(503, {"error": "loading"}))
    gateway = start_gateway(alpha, MODEL_DISCOVERY_REFRESH_S="0.3")
    assert known(gateway) == (RESPONSES,)
    alpha.play(MESSAGES, None)
    until(lambda: known(gateway) == (MESSAGES, RESPONSES), 5)
    asked = len(alpha.calls(MESSAGES))
    time.sleep(1)
    assert len(alpha.calls(MESSAGES)) == asked


def test_a_refresh_asks_again(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    assert known(gateway) == (MESSAGES, RESPONSES)
    alpha.healthy.is_native = False
    gateway.call(gateway.components.discovery.refresh())
    assert known(gateway) == (MESSAGES, RESPONSES)
    gateway.call(gateway.components.discovery.refreshed())
    assert known(gateway) == ()


def test_a_path_that_never_answers_does_not_delay_the_models(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes, "DEADLINE_S", 0.5)
    alpha.play(MESSAGES, [Forever()])
    gateway = start_gateway(alpha)
    body = {"model": "llama3.2", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
    with gateway.http(gateway.key()) as client:
        assert client.get("/api/tags").json()["models"]
        assert client.post(MESSAGES, json=body).status_code == 200
    assert alpha.calls("/v1/chat/completions"), "until its path is known, calls are translated"


def test_the_responses_of_llamacpp_are_translated(start_gateway: StartGateway) -> None:
    """Its events have neither numbers nor indexes."""
    with FakeBackend(kind="openai", models=["m"], name="beta", is_native=True) as beta:
        gateway = start_gateway(beta)
        assert RESPONSES not in known(gateway) and "/v1/responses/input_tokens" in known(gateway)
        with gateway.openai(gateway.key()) as client:
            assert client.responses.create(model="m", input="Say hi").output_text == "beta heard: Say hi"
        assert beta.calls("/v1/chat/completions")
