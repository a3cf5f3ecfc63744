"""Against a real llama.cpp server, whose address is in LLAMA_SERVER_URL: lists, answers, streams, limits, failover to it."""

import os
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import MESSAGES
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS
from tests.support.running_gateway import RunningGateway

URL = os.environ.get("LLAMA_SERVER_URL", "")
MODEL = "tiny-random"

pytestmark = pytest.mark.skipif(not URL, reason="LLAMA_SERVER_URL names no llama.cpp server")


@pytest.fixture
def alpha() -> Iterator[FakeBackend]:
    with FakeBackend("openai", [MODEL], name="alpha") as backend:
        yield backend


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, {"name": "llama", "base_url": URL, "kind": "openai"}, OLLAMA_READ_TIMEOUT_S="20")


@pytest.fixture
def only_llama(start_gateway: StartGateway) -> RunningGateway:
    return start_gateway({"name": "llama", "base_url": URL, "kind": "openai"}, OLLAMA_READ_TIMEOUT_S="20")


def test_its_model_is_listed_to_both_clients(only_llama: RunningGateway) -> None:
    key = only_llama.key()
    with only_llama.openai(key) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
    assert [model.model for model in only_llama.ollama(key).list().models] == [MODEL]
    assert only_llama.ollama(key).show(MODEL).capabilities == ["completion"]


def test_it_answers_whole_and_streamed_with_usage(only_llama: RunningGateway) -> None:
    with only_llama.openai(only_llama.key()) as client:
        whole = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=8)
        assert whole.choices[0].message.content is not None and whole.usage and whole.usage.completion_tokens <= 8
        stream = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        assert chunks[-1].usage and chunks[-1].usage.completion_tokens <= 8
        assert client.completions.create(model=MODEL, prompt="Say", max_tokens=4).usage.completion_tokens <= 4
    line = only_llama.request_lines()[1]
    assert line["completion_tokens"] and line["prompt_tokens"] and line["backend"] == "llama"


def test_the_output_is_limited_whatever_is_requested(start_gateway: StartGateway) -> None:
    gateway = start_gateway(
        {"name": "llama", "base_url": URL, "kind": "openai"}, MAX_NUM_PREDICT="6", OLLAMA_READ_TIMEOUT_S="20"
    )
    with gateway.http(gateway.key()) as client:
        for wish in ({}, {"n_predict": 500}, {"max_tokens": -1}, {"max_completion_tokens": 10**9, "n_predict": -1}):
            got = client.post("/v1/chat/completions", json={"model": MODEL, "messages": MESSAGES, **wish}).json()
            assert got["usage"]["completion_tokens"] <= 6, (wish, got)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "error_first_frame", "refused", "frozen"])
def test_it_takes_over_from_a_broken_backend(
    start_gateway: StartGateway, alpha: FakeBackend, fault: str, streamed: bool
) -> None:
    real = {"name": "llama", "base_url": URL, "kind": "openai"}
    gateway = start_gateway(alpha, real, OLLAMA_READ_TIMEOUT_S="2")
    if fault == "refused":
        alpha.stop()
    elif fault == "frozen":
        alpha.freeze()
    else:
        alpha.play("/v1/chat/completions", FAULTS[fault]("openai", streamed))
    with gateway.http(gateway.key()) as client:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4, "stream": streamed}
        got = client.post("/v1/chat/completions", json=body)
    if fault == "frozen":
        alpha.thaw()
    assert got.status_code == 200 and "alpha heard" not in got.text
    assert gateway.request_lines()[-1]["backend"] == "llama"


def test_a_client_that_leaves_frees_its_slot(only_llama: RunningGateway) -> None:
    with only_llama.http(only_llama.key()) as client:
        body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as got:
            next(got.iter_raw())
        deadline = time.monotonic() + 3
        while b"llamacpp:requests_processing 0" not in _metrics() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert b"llamacpp:requests_processing 0" in _metrics()


def _metrics() -> bytes:
    return subprocess.run(["curl", "-s", f"{URL}/metrics"], capture_output=True, check=True).stdout
