"""Against real llama.cpp servers, whose addresses are in LLAMA_SERVER_URLS: conversations stay where they are cached.

Start two of the same model, each with `--parallel 2` and a context of 8,192 tokens or more for a slot.
"""

import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import httpx
import pytest

from tests.conftest import StartGateway
from tests.support.running_gateway import RunningGateway

URLS = os.environ.get("LLAMA_SERVER_URLS", "").split()
CONVERSATIONS, TURNS = 4, 10
FIRST_WORDS, MORE_WORDS = 300, 120
WORDS = re.findall(r"\b[a-z]{2,12}\b", " ".join(topics.values()))
# What was not cached of a turn that is: the client's words, in tokens, and what the template adds.
NEW_PART = 0.35

pytestmark = [
    pytest.mark.skipif(len(URLS) < 2, reason="LLAMA_SERVER_URLS names no two llama.cpp servers"),
    pytest.mark.usual_slots,
]


class Turn(NamedTuple):
    conversation: int
    prompt: int
    cached: int
    backend: str
    why: str


@pytest.fixture
def model() -> str:
    found: str = httpx.get(f"{URLS[0]}/v1/models").json()["data"][0]["id"]
    return found


@pytest.fixture
def fleet(start_gateway: StartGateway) -> RunningGateway:
    backends = [{"name": f"llama{n}", "base_url": url, "kind": "openai", "tier": 1} for n, url in enumerate(URLS)]
    return start_gateway(*backends, ROUTING="fast", OLLAMA_READ_TIMEOUT_S="60")


def words(number: int) -> str:
    """Different ones in each call, so that no earlier run has left anything in a cache."""
    return " ".join(random.choices(WORDS, k=number))


def converse(clients: Sequence[httpx.Client], turns: Iterator[int], model: str, number: int) -> list[Turn]:
    """Each turn goes to the next of the clients."""
    messages: list[Any] = [{"role": "system", "content": words(FIRST_WORDS)}]
    found = []
    for _ in range(TURNS):
        messages.append({"role": "user", "content": words(MORE_WORDS)})
        client = clients[next(turns) % len(clients)]
        got = client.post("/v1/chat/completions", json={"model": model, "messages": messages, "max_tokens": 16})
        answer = got.json()
        usage, headers = answer["usage"], got.headers
        messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"] or "-"})
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        where = headers.get("x-gateway-backend", ""), headers.get("x-gateway-chosen", "")
        found.append(Turn(number, usage["prompt_tokens"], cached, *where))
    return found


def talk(clients: Sequence[httpx.Client], model: str) -> list[Turn]:
    turns = count()
    with ThreadPoolExecutor(CONVERSATIONS) as threads:
        work = [threads.submit(converse, clients, turns, model, number) for number in range(CONVERSATIONS)]
        return [turn for each in work for turn in each.result()]


def hits(turns: Sequence[Turn]) -> float:
    return sum(turn.cached for turn in turns) / sum(turn.prompt for turn in turns)


def shows_backends(gateway: RunningGateway) -> str:
    return gateway.key(flags=("show_backend",))


def test_conversations_stay_where_they_are_cached(fleet: RunningGateway, model: str) -> None:
    with fleet.http(shows_backends(fleet)) as client:
        client.timeout = httpx.Timeout(60)
        turns = talk([client], model)
    in_turn = [httpx.Client(base_url=url, timeout=60) for url in URLS]
    round_robin = talk(in_turn, model)
    for each in in_turn:
        each.close()
    assert len(turns) == len(round_robin) == CONVERSATIONS * TURNS
    assert hits(turns) > hits(round_robin), (hits(turns), hits(round_robin))
    later = [turn for number in range(CONVERSATIONS) for turn in turns[number * TURNS + 1 : (number + 1) * TURNS]]
    assert sum(turn.why == "home" for turn in later) >= 0.9 * len(later), [turn.why for turn in later]
    for turn in later:
        if turn.why == "home":
            assert turn.cached >= (1 - NEW_PART) * turn.prompt, turn
    assert {turn.backend for turn in turns} == {f"llama{n}" for n in range(len(URLS))}


@contextmanager
def most_deferred() -> Iterator[list[int]]:
    """The most calls that have waited inside each server."""
    found, is_over = [0 for _ in URLS], threading.Event()

    def watch() -> None:
        while not is_over.is_set():
            for number, url in enumerate(URLS):
                found[number] = max(found[number], metric(url, "requests_deferred"))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        is_over.set()
        watcher.join()


def metric(url: str, name: str) -> int:
    lines = subprocess.run(["curl", "-s", f"{url}/metrics"], capture_output=True, check=True, text=True).stdout.splitlines()
    return round(float(next(line.split()[1] for line in lines if line.startswith(f"llamacpp:{name} "))))


def test_no_call_waits_inside_a_server(fleet: RunningGateway, model: str) -> None:
    slots = {offer.backend: offer.slots for offer in fleet.components.catalog().models[f"{model}:latest"].offers}
    assert slots == {f"llama{n}": httpx.get(f"{url}/props").json()["total_slots"] for n, url in enumerate(URLS)}
    key, calls = shows_backends(fleet), 4 * sum(slots.values())

    def ask(_: int) -> httpx.Response:
        with fleet.http(key) as client:
            body = {"model": model, "messages": [{"role": "user", "content": words(MORE_WORDS)}], "max_tokens": 24}
            return client.post("/v1/chat/completions", json=body)

    with most_deferred() as deferred, ThreadPoolExecutor(calls) as threads:
        answers = list(threads.map(ask, range(calls)))
    assert [answer.status_code for answer in answers] == [200] * calls
    assert deferred == [0 for _ in URLS]
    assert sum(answer.headers["x-queue-position"] != "0" for answer in answers) >= calls // 2
    fleet.wait_idle()
    assert fleet.components.placing.queue.running == 0
