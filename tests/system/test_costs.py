"""The cost of a request in units that are the same on every machine: function calls, store calls, memory, garbage."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.bench import areas
from tests.bench.profile import counted
from tests.bench.profiled import CALLS, COSTS
from tests.conftest import TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import environment_for
from tests.support.processes import operate, serving

MODEL, ALIAS = "llama3.2:latest", "mini"
REQUESTS, STREAMS, PIECES = 300, 10, 150
REQUEST_AREAS = ("server", "application", "keys", "limits", "dialect", "exchange", "routing", "log", "metrics")
# The measured counts plus a margin for other versions of Python and the libraries; more is a regression.
MOST_CALLS, MOST_CALLS_PER_FRAME = 760, 32
# The name in each frame of an answer to a call for an alias.
MORE_OF_AN_ALIAS_PER_FRAME = 8
REDIS_CALLS, SQL_CALLS = 4.1, 0.1
GARBAGE, BLOCKS = 0.5, 20.0


@dataclass
class Costs:
    account: areas.Account
    collected: int
    blocks: int

    @property
    def calls(self) -> int:
        """Function calls in the areas that a request passes through; the others also work periodically."""
        return sum(self.account.calls[area] for area in REQUEST_AREAS)


@dataclass
class Counting:
    """A gateway that counts its function calls."""

    folder: Path
    pid: int
    client: httpx.Client

    def during(self, work: Callable[[], object]) -> Costs:
        with counted([self.pid], self.folder):
            work()
        values = json.loads((self.folder / COSTS).read_text())
        return Costs(areas.read(self.folder / CALLS), **values)

    def least(self, work: Callable[[], object], garbage: float, calls: float) -> Costs:
        """The lowest cost of up to four runs: on a busy machine some runs cost more, for example when Redis is late."""
        for _ in range(4):
            costs = self.during(work)
            if costs.collected <= garbage and costs.calls <= calls:
                break
        return costs

    def ask(self, path: str, times: int, **more: Any) -> None:
        messages = [{"role": "user", "content": "Say something."}]
        for _ in range(times):
            answer = self.client.post(path, json={"model": MODEL, "messages": messages} | more)
            assert answer.status_code == 200, answer.text


@pytest.fixture
def counting(tmp_path: Path, stores: TestStores, request: pytest.FixtureRequest) -> Iterator[Counting]:
    pieces, pause_s = getattr(request, "param", (3, 0.0))
    with FakeBackend(models=[MODEL], name="alpha", pieces=3) as backend:
        aliases = {"MODEL_ALIASES": json.dumps({ALIAS: MODEL})}
        names = environment_for(backend, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, **aliases)
        key = operate(tmp_path, names, "key", "--name", "counted").split()[-1]
        entry = ("-m", "tests.bench.profiled", str(tmp_path))
        with serving(tmp_path, names, entry=entry) as (process, url, _):
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
                found = Counting(tmp_path, process.pid, client)
                found.ask("/api/chat", 20, stream=False)
                backend.healthy.pieces, backend.healthy.pause_s = pieces, pause_s
                yield found


@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_the_cost_of_a_whole_answer(counting: Counting, path: str) -> None:
    costs = counting.least(lambda: counting.ask(path, REQUESTS, stream=False), GARBAGE * REQUESTS, MOST_CALLS * REQUESTS)
    account = costs.account
    assert account.calls_of("edge/protocol.py", "on_headers_complete") >= REQUESTS, "the requests were counted at all"
    assert costs.calls / REQUESTS <= MOST_CALLS
    # Redis calls to admit, for a slot of a backend, and two that nobody waits for: to free it and to settle; of the database a
    # share of a batch.
    assert account.calls_of("stores/redis_connection.py", "run") / REQUESTS <= REDIS_CALLS
    assert account.calls_of("stores/postgres.py", "_acquire") / REQUESTS <= SQL_CALLS
    assert costs.collected / REQUESTS <= GARBAGE, "what a request leaves behind waits for the collector"
    assert costs.blocks / REQUESTS <= BLOCKS, "memory that a request leaves in use"


@pytest.mark.parametrize("counting", [(PIECES, 0.002)], indirect=True)
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_the_cost_of_a_stream(counting: Counting, path: str) -> None:
    most_calls = MOST_CALLS_PER_FRAME * STREAMS * PIECES
    costs = counting.least(lambda: counting.ask(path, STREAMS, stream=True), GARBAGE * STREAMS, most_calls)
    assert costs.account.calls_of("edge/cycle.py", "push") >= STREAMS * PIECES / 2, "the frames were counted at all"
    assert costs.calls / (STREAMS * PIECES) <= MOST_CALLS_PER_FRAME
    assert costs.collected / STREAMS <= GARBAGE


@pytest.mark.parametrize("counting", [(PIECES, 0.002)], indirect=True)
def test_the_cost_of_an_alias(counting: Counting) -> None:
    path, frames = "/v1/chat/completions", STREAMS * PIECES
    most = (MOST_CALLS_PER_FRAME + MORE_OF_AN_ALIAS_PER_FRAME) * frames
    costs = counting.least(lambda: counting.ask(path, STREAMS, stream=True, model=ALIAS), GARBAGE * STREAMS, most)
    assert costs.account.calls_of("dialects/answered_model.py", "frames_renamed") >= STREAMS, "the names were written at all"
    assert costs.calls / frames <= MOST_CALLS_PER_FRAME + MORE_OF_AN_ALIAS_PER_FRAME
    assert costs.collected / STREAMS <= GARBAGE
