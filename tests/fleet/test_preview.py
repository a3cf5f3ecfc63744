"""What is shown of the board before a call, and of all calls, is what the board then does."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.conftest import TestStores
from tests.fleet.test_board import GB, History, fast, ollama
from tests.support.fleet_board import Ask, At, FleetBoard


@pytest.fixture
def board(stores: TestStores) -> Iterator[FleetBoard]:
    with stores.client() as client:
        board = FleetBoard(client)
        board.tick()
        yield board


# By type.
READ: dict[Any, Callable[[Any, bytes], Any]] = {
    b"hash": lambda client, name: client.hgetall(name),
    b"zset": lambda client, name: client.zrange(name, 0, -1, withscores=True),
    b"set": lambda client, name: client.smembers(name),
}


def dump(board: FleetBoard) -> dict[bytes, Any]:
    names: Any = board.client.keys("*")
    return {name: READ[board.client.type(name)](board.client, name) for name in names}


class Watched(History):
    """Looks at each call before it comes."""

    def __init__(self, board: FleetBoard, seed: int) -> None:
        self.met: Counter[str] = Counter()
        super().__init__(board, seed)

    def asks(self, ask: Ask) -> list[Any]:
        self.tick()
        before = dump(self.board)
        found = self.board.preview(ask)
        assert dump(self.board) == before, "nothing is taken"
        reply = super().asks(ask)
        self.met[reply[0]] += 1
        if reply[0] == "go":
            chosen = next(place for place in found["places"] if place["is_chosen"])
            assert (found["position"], chosen["backend"], chosen["why"]) == (0, reply[1], reply[3])
            assert int(found["ms"]) == reply[6]
        else:
            assert (found["position"], found["waiting"] + 1) == (reply[1], self.waits_for(ask.group))
            assert int(found["ms"]) == reply[2]
        return reply

    def waits_for(self, group: str) -> int:
        return next((queue.calls for queue in self.board.state().queues if queue.model == group), 0)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_shown_before_a_call_is_what_then_happens(board: FleetBoard, seed: int) -> None:
    history = Watched(board, seed)
    for _ in range(200):
        history.go_on()
    assert min(history.met["go"], history.met["wait"]) > 20, history.met
    running = Counter((box, model) for _, box, model in history.held.values())
    assert {(place.backend, place.model): place.running for place in board.state().places} == running


def test_a_newcomer_is_shown_in_its_fair_place(board: FleetBoard) -> None:
    place = At("a", service_ms=10_000)
    board.take(Ask("runs", (place,), client="heavy"))
    for number in range(5):
        board.take(Ask(f"h{number}", (place,), client="heavy", prompt=100))
    light, heavy = Ask("l", (place,), client="light"), Ask("h", (place,), client="heavy")
    found = board.preview(light)
    assert (found["position"], found["waiting"], found["tokens"], found["full"]) == (2, 5, 500, False)
    assert board.preview(heavy)["position"] == 6
    assert board.preview(replace(light, batch=True))["position"] == 6, "a batch yields"
    assert [board.preview(replace(light, size=5))["full"], board.preview(replace(light, patience_ms=0))["full"]] == [True, True]
    assert found["wait"] == 20_100 == found["ms"] - found["places"][0]["prefill"]
    assert board.take(light)[:3] == ["wait", 2, 20_100]


def test_every_term_of_every_backend_is_shown_with_each_rule(board: FleetBoard) -> None:
    board.loaded("b", "m", 5 * GB)
    board.now += 60_000
    places = (ollama("a", load_ms=7000), ollama("b", slots=2), ollama("c", tier=2))
    board.take(fast("runs", places[1]))
    for mode, chosen, why in (("order", "a", "order"), ("warm", "b", "loaded"), ("fast", "b", "loaded")):
        found = board.preview(Ask("x", places, mode=mode, prompt=2000))
        terms = {place["backend"]: place for place in found["places"]}
        assert [(name, one["load"], one["prefill"]) for name, one in terms.items()] == [
            ("a", 7000, 2000),
            ("b", 0, 2000),
            ("c", 5000, 2000),
        ]
        assert [name for name, one in terms.items() if one["is_chosen"]] == [chosen] and terms[chosen]["why"] == why
        assert (terms["b"]["running"], terms["b"]["slots"], found["position"]) == (1, 2, 0)


def test_the_state_has_all_that_waits_and_runs(board: FleetBoard) -> None:
    assert board.state() == ((), ())
    place = At("a", service_ms=10_000)
    board.take(Ask("runs", (place,)))
    board.take(Ask("c0", (place,), prompt=400))
    board.now += 3000
    for number in range(30):
        board.take(Ask(f"d{number}", (place,), client=f"client {number}", prompt=10))
    board.take(Ask("elsewhere", (At("b", "n"),), group="n"))
    before = dump(board)
    state = board.state()
    assert dump(board) == before
    [queue] = state.queues
    assert (queue.model, queue.calls, queue.tokens, queue.oldest_s) == ("m", 31, 700, 3.0)
    assert queue.first_s is not None and 7.0 < queue.first_s <= 7.4
    assert queue.last_s is not None and 290 < queue.last_s < 320, "also those that the rule does not look at yet"
    assert state.places == (("a", "m", 1, 7.0), ("b", "n", 1, 1.0))
    unestimated = board.state(with_estimates=False)
    assert unestimated == (tuple(queue._replace(first_s=None, last_s=None) for queue in state.queues), state.places)
