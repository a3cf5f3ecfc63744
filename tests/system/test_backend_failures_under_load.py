"""Under load, with a first backend that is killed, frozen or failing, every request is still answered."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

LLAMA = os.environ.get("LLAMA_SERVER_URL", "")
PATHS = ("/api/chat", "/v1/chat/completions")


@contextmanager
def killed(alpha: FakeBackend) -> Iterator[None]:
    alpha.stop()
    yield
    alpha.start()


@contextmanager
def frozen(alpha: FakeBackend) -> Iterator[None]:
    alpha.freeze()
    yield
    alpha.thaw()


@contextmanager
def failing(alpha: FakeBackend) -> Iterator[None]:
    for path in PATHS:
        alpha.play(path, answer(500, {"error": "broken"}))
    yield
    for path in PATHS:
        alpha.play(path, None)


def keep_asking(gateway: RunningGateway, key: str, stop: threading.Event, ask: Callable[[], str], got: list[str]) -> None:
    while not stop.is_set():
        try:
            got.append(ask())
        except Exception as failure:  # noqa: BLE001 any failure of a client counts
            got.append(f"FAILED {failure!r}")


def asking(gateway: RunningGateway, key: str) -> list[Callable[[], str]]:
    def ask_as(chat: Chat) -> Callable[[], str]:
        return lambda: chat.ask(gateway, key)

    return [ask_as(chat) for chat in CHATS] + ([lambda: ask_llama(gateway, key)] if LLAMA else [])


def ask_llama(gateway: RunningGateway, key: str) -> str:
    with gateway.openai(key) as client:
        body = {"model": "tiny-random", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
        return f"llama: {client.chat.completions.create(**body).choices[0].message.content is not None}"


@pytest.mark.parametrize("trouble", [killed, frozen, failing])
def test_answers_continue_while_the_first_backend_is_in_trouble(
    start_gateway: StartGateway, trouble: Callable[..., object]
) -> None:
    with ExitStack() as stack:
        alpha = stack.enter_context(FakeBackend(models=["llama3.2:latest", "only-alpha:latest"], name="alpha"))
        beta = stack.enter_context(FakeBackend(models=["llama3.2:latest"], name="beta"))
        more = [{"name": "llama", "base_url": LLAMA, "kind": "openai"}] if LLAMA else []
        gateway = start_gateway(alpha, beta, *more, OLLAMA_READ_TIMEOUT_S="1", OLLAMA_CONNECT_TIMEOUT_S="0.5")
        key = gateway.key()
        with gateway.openai(key) as client:
            union = {model.id for model in client.models.list()}
        assert union == {"llama3.2:latest", "only-alpha:latest"} | ({"tiny-random"} if LLAMA else set())
        assert {model.model for model in gateway.ollama(key).list().models} == union
        got = load_through(gateway, key, lambda: trouble(alpha))
    assert not [one for one in got if one.startswith("FAILED")]
    assert {"alpha heard: Say hi", "beta heard: Say hi"} <= set(got)
    assert not LLAMA or "llama: True" in got


def load_through(gateway: RunningGateway, key: str, trouble: Callable[[], object]) -> list[str]:
    got: list[str] = []
    stop = threading.Event()
    threads = [
        threading.Thread(target=keep_asking, args=(gateway, key, stop, ask, got))
        for ask in asking(gateway, key)
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    until(lambda: "alpha heard: Say hi" in got, 30)
    with trouble():  # type: ignore[attr-defined]
        until(lambda: "beta heard: Say hi" in got, 30)
        time.sleep(2)
    time.sleep(0.7)
    stop.set()
    for thread in threads:
        thread.join(20)
    return got
