"""Who gets which slot, decided in Redis for all processes: exact, fair, without loads that are not needed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import pytest

from gateway.fleet.board import LEASE_MS
from tests.conftest import TestStores
from tests.support.fleet_board import Ask, At, FleetBoard

GB = 10**9


@pytest.fixture
def board(stores: TestStores) -> Iterator[FleetBoard]:
    with stores.client() as client:
        board = FleetBoard(client)
        board.tick()
        yield board


def ollama(name: str, model: str = "m", size: int = 5 * GB, load_ms: int = 5000, **more: Any) -> At:
    return At(name, model, swaps=True, size=size, load_ms=load_ms, **more)


def fast(call: str, *places: At, **more: Any) -> Ask:
    return Ask(call, places, mode="fast", group=more.pop("group", places[0].model), **more)


def test_in_order_the_first_with_a_free_slot_is_taken_and_who_finds_none_waits(board: FleetBoard) -> None:
    places = (At("a"), At("b", slots=2))
    replies = [board.take(Ask(f"c{number}", places)) for number in range(4)]
    assert [reply[1] for reply in replies[:3]] == ["a", "b", "b"]
    assert replies[3][:2] == ["wait", 1]
    assert [board.running("a"), board.running("b")] == [1, 2]
    board.release("c1")
    assert board.granted["c3"][:3] == ["b", "m", "order"]
    assert board.running("b") == 2


def test_a_queue_is_bounded_by_calls_and_by_tokens(board: FleetBoard) -> None:
    board.take(Ask("c0", (At("a"),)))
    assert board.take(Ask("c1", (At("a"),), size=2, prompt=900, tokens=1000))[0] == "wait"
    assert board.take(Ask("c2", (At("a"),), size=2, prompt=200, tokens=1000))[0] == "full"
    assert board.take(Ask("c3", (At("a"),), size=2, prompt=100, tokens=1000, client="bob"))[0] == "wait"
    reply = board.take(Ask("c4", (At("a"),), size=2))
    assert reply[0] == "full"
    assert 2500 <= reply[1] <= 5000, "two calls of a second each, and their prompts, are before it"
    assert board.take(Ask("c5", (At("a"),), patience_ms=0))[0] == "full"


def test_one_client_leaves_room_in_the_queue_for_others(board: FleetBoard) -> None:
    def waiting(client: str, **more: Any) -> int:
        asks = (Ask(f"{client}{number}", (At("a"),), client=client, **more) for number in range(50))
        return [board.take(ask)[0] for ask in asks].count("wait")

    board.take(Ask("c0", (At("a"),)))
    assert waiting("greedy", size=40) == 30
    assert waiting("second", size=40) == 8
    assert waiting("third", size=40) == 2
    assert waiting("large", group="tokens", mode="order", prompt=100, tokens=4000) == 30
    assert waiting("small", group="tokens", mode="order", prompt=10, tokens=4000) == 50


def test_no_group_is_overlooked_however_many_calls_wait_in_others(board: FleetBoard) -> None:
    models = [f"m{number}" for number in range(9)]
    for model in models:
        board.take(Ask(f"runs {model}", (At("a", model),), group=model))
        for number in range(26):
            board.take(Ask(f"waits {model} {number}", (At("a", model),), group=model))
    assert board.take(fast("free", At("b", "other")))[0] == "go", "its backend is idle"
    for model in models:
        board.take(Ask(f"last {model}", (At("a", model),), group=model, client="bob"))
        board.release(f"runs {model}")
    assert {found[1] for found in board.granted.values()} == set(models)


def test_of_many_clients_and_users_that_were_there_once_only_the_last_are_remembered(board: FleetBoard) -> None:
    for number in range(1200):
        board.now += 10
        board.take(Ask("c", (At("a"),), client=f"k{number % 2}", sub_user=f"u{number}"))
        board.release("c", 1000)
    assert board.client.hlen("fleet:fair:m") <= 1024 + 6
    board.take(Ask("c", (At("a"),), client="k0", sub_user="u0"))
    assert board.client.hexists("fleet:fair:m", "k0")


def test_the_place_in_a_long_queue_is_that_of_the_fair_order(board: FleetBoard) -> None:
    for number in range(40):
        board.take(Ask(f"heavy{number}", (At("a"),), client="heavy"))
    board.now += 1000
    board.release("heavy0", 1000)
    assert board.take(Ask("heavy40", (At("a"),), client="heavy"))[1] == 39
    assert board.take(Ask("light", (At("a"),), client="light"))[1] == 1
    board.release("heavy1", 1000)
    assert set(board.granted) == {"heavy1", "light"}


def test_what_a_process_has_ends_with_its_lease(board: FleetBoard) -> None:
    board.tick("p2")
    board.take(Ask("gone", (At("a"),), process="p2"))
    board.take(Ask("gone too", (At("a"),), process="p2"))
    board.take(Ask("stays", (At("a"),)))
    board.now += LEASE_MS // 2
    board.tick("p1")
    assert not board.granted
    board.now += LEASE_MS // 2 + 1
    board.tick("p1")
    assert set(board.granted) == {"stays"}
    board.release("stays")
    assert board.names() == set()


def test_what_redis_has_lost_is_restored_and_what_it_has_missed_is_removed(board: FleetBoard) -> None:
    board.take(Ask("runs", (At("a"),)))
    board.take(Ask("waits", (At("a"),)))
    board.take(Ask("has ended", (At("b"),)))
    board.client.flushdb()
    assert board.tick()[0] == 0
    running = ["runs", "a", "m", "m", "alice", "", 1.0, 1000, 0]
    assert board.run("restore", "p1", 1, "waits", *running) == [0, 1]
    assert board.running("a") == 1
    assert board.ask(Ask("waits", (At("a"),)))[0] == "gone"
    assert board.take(Ask("waits", (At("a"),)))[0] == "wait"
    board.take(Ask("has ended", (At("b"),)))
    assert board.run("restore", "p1", 1, "waits", *running) == [1, 0]
    assert board.running("b") == 0
    assert board.run("restore", "p1", 0) == [2, 0]
    assert board.names() == set()


def test_a_call_that_runs_elsewhere_than_the_board_has_it_is_put_where_it_runs(board: FleetBoard) -> None:
    """The reply that granted it a slot was lost, and its process chose by itself."""
    board.take(Ask("c0", (At("a"),)))
    assert board.run("restore", "p1", 0, "c0", "b", "m", "m", "alice", "", 1.0, 1000, 0) == [1, 1]
    assert (board.running("a"), board.running("b")) == (0, 1)
    board.release("c0")
    assert board.names() == set()


def test_what_a_process_has_ends_with_it_even_if_it_never_renewed_its_lease(board: FleetBoard) -> None:
    board.take(Ask("gone", (At("a"),), process="p2"))
    board.run("restore", "p3", 0, "gone too", "b", "m", "m", "alice", "", 1.0, 1000, 0)
    for _ in range(3):
        board.now += LEASE_MS // 2
        board.tick("p1")
    assert board.names() == set()


def test_who_leaves_takes_along_what_is_still_on_the_board_of_it(board: FleetBoard) -> None:
    for number in range(2):
        board.take(Ask(f"c{number}", (At("a"),), process="p2"))
    board.take(Ask("stays", (At("a"),)))
    board.run("leave", "p2")
    assert set(board.granted) == {"stays"}
    assert board.client.zscore("fleet:processes", "p2") is None
    board.release("stays")
    assert board.names() == set()


def test_nobody_loses_what_it_has_because_redis_was_away_for_longer_than_a_lease(board: FleetBoard) -> None:
    for process in ("p1", "p2"):
        board.tick(process)
        board.take(Ask(process, (At("a", slots=2),), process=process))
    board.now += LEASE_MS + 1
    assert board.tick("p2")[:2] == [1, 1]
    board.now += 1000
    assert board.tick("p1")[:2] == [1, 1]
    assert board.running("a") == 2
    for _ in range(3):
        board.now += LEASE_MS // 2
        board.tick("p1")
    assert set(board.calls()) == {"p1"}, "who does not come back is gone"


def shares(board: FleetBoard, asks: dict[str, Ask], cost_ms: dict[str, int], turns: int) -> dict[str, int]:
    """The cost that was served of clients which always have calls in the queue, at one place."""
    numbers, served, owner = count(), dict.fromkeys(asks, 0), {}

    def add(client: str, times: int = 1) -> None:
        for _ in range(times):
            call = f"c{next(numbers)}"
            owner[call] = client
            reply = board.take(replace(asks[client], id=call, arrived=board.now))
            if reply[0] == "go":
                board.granted[call] = reply[1:]

    for client in asks:
        add(client, 3)
    for _ in range(turns):
        call = next(iter(board.granted))
        del board.granted[call]
        client = owner[call]
        served[client] += cost_ms[client]
        board.now += cost_ms[client]
        add(client)
        board.release(call, cost_ms[client])
    return served


def test_clients_that_always_wait_get_the_same_cost_though_one_asks_for_a_hundred_times_as_much(board: FleetBoard) -> None:
    place = At("a", service_ms=1000)
    asks = {"light": Ask("", (place,), client="light"), "heavy": Ask("", (replace(place, service_ms=8000),), client="heavy")}
    costs = {"light": 1000, "heavy": 8000}
    served = shares(board, asks, costs, 300)
    assert abs(served["light"] - served["heavy"]) <= 6 * max(costs.values()), "the bound of docs/fleet.md, with one slot"


def test_a_wrong_estimate_is_settled_with_what_a_call_has_cost(board: FleetBoard) -> None:
    place = At("a", service_ms=1000)
    asks = {name: Ask("", (place,), client=name) for name in ("as estimated", "much longer")}
    served = shares(board, asks, {"as estimated": 1000, "much longer": 5000}, 300)
    assert abs(served["as estimated"] - served["much longer"]) <= 3 * 5000


def test_shares_are_in_proportion_to_weights(board: FleetBoard) -> None:
    asks = {name: Ask("", (At("a"),), client=name, weight=weight) for name, weight in (("one", 1.0), ("three", 3.0))}
    served = shares(board, asks, {"one": 1000, "three": 1000}, 400)
    assert served["three"] / served["one"] == pytest.approx(3, rel=0.05)


def test_the_users_of_a_key_share_what_the_key_gets(board: FleetBoard) -> None:
    asks = {
        "ann": Ask("", (At("a"),), client="shared", sub_user="ann"),
        "ben": Ask("", (At("a"),), client="shared", sub_user="ben"),
        "own": Ask("", (At("a"),), client="own"),
    }
    served = shares(board, asks, dict.fromkeys(asks, 1000), 400)
    assert served["own"] == pytest.approx(served["ann"] + served["ben"], rel=0.05)
    assert served["ann"] == pytest.approx(served["ben"], rel=0.05)


def test_a_client_that_was_idle_has_saved_nothing_and_waits_for_nobody_s_backlog(board: FleetBoard) -> None:
    for number in range(20):
        board.take(Ask(f"heavy{number}", (At("a"),), client="heavy"))
    for number in range(10):
        board.now += 1000
        board.release(f"heavy{number}", 1000)
    assert board.take(Ask("light", (At("a"),), client="light"))[1] == 1
    board.release("heavy10", 1000)
    assert "light" in board.granted
    for number in range(5):
        board.take(Ask(f"light{number}", (At("a"),), client="light"))
    before = set(board.granted)
    board.release("light", 1000)
    board.release(next(iter(set(board.granted) - before)), 1000)
    assert any(call.startswith("heavy") for call in set(board.granted) - before), "the others come in turn"


def test_batches_yield_and_leave_the_last_slot_but_not_for_ever(board: FleetBoard) -> None:
    places = (At("a", slots=2, service_ms=60_000),)
    batch = Ask("", places, mode="fast", client="job", batch=True, patience_ms=100_000)
    assert board.take(replace(batch, id="b0"))[0] == "go"
    assert board.take(replace(batch, id="b1"))[0] == "wait"
    assert board.take(Ask("i0", places, mode="fast", client="person"))[0] == "go"
    board.take(replace(batch, id="b2"))
    board.take(Ask("i1", places, mode="fast", client="person"))
    assert set(board.granted) == set()
    board.release("b0", 60_000)
    assert set(board.granted) == {"i1"}
    board.release("i0", 60_000)
    assert set(board.granted) == {"i1"}, "one slot is left free"
    board.now += 51_000
    board.take(Ask("i2", places, mode="fast", client="person"))
    board.take(Ask("i3", places, mode="fast", client="person"))
    board.release("i1", 60_000)
    assert "b1" in board.granted, "it has waited for half of its time"


def test_a_batch_of_a_client_lets_the_same_client_s_other_calls_pass(board: FleetBoard) -> None:
    board.take(Ask("c0", (At("a"),)))
    for number in range(3):
        board.take(Ask(f"b{number}", (At("a"),), batch=True))
    board.take(Ask("i0", (At("a"),)))
    board.release("c0")
    assert set(board.granted) == {"i0"}
    board.release("i0")
    assert set(board.granted) == {"i0", "b0"}


def test_batches_of_many_users_hide_nobody_and_no_user_is_hidden_by_others(board: FleetBoard) -> None:
    slots = At("a", slots=2, service_ms=60_000)
    board.take(fast("c0", slots, client="k"))
    for number in range(80):
        board.take(fast(f"b{number}", slots, client="k", sub_user=f"u{number}", batch=True))
    board.take(fast("c1", slots, client="other"))
    board.take(fast("i0", slots, client="other"))
    board.release("c1", 60_000)
    assert set(board.granted) == {"i0"}
    slot, turns = At("b", "n"), list[str]()
    board.take(Ask("d", (slot,), group="n"))
    for number in range(80):
        board.take(Ask(f"s{number}.0", (slot,), client="k", sub_user=f"u{number}", group="n", size=200))
    board.release("d", 1000)
    for _ in range(79):
        (now,) = set(board.granted) - {"i0", *turns}
        turns.append(now)
        user, turn = now[1:].split(".")
        board.take(Ask(f"s{user}.{int(turn) + 1}", (slot,), client="k", sub_user=f"u{user}", group="n", size=200))
        board.release(now, 1000)
    assert all(call.endswith(".0") for call in turns), "each user has a turn before any has two"


def test_a_conversation_stays_where_it_is_cached_while_that_is_worth_the_wait(board: FleetBoard) -> None:
    places = (At("a", slots=2, prefill_us=1000), At("b", slots=2, prefill_us=900))
    common = {"sticky_ms": 600_000, "prompt": 10_000}
    first = board.take(fast("c0", places[0], **common, conversation=("h1", (), ("s", 8000))))
    assert first[1] == "a"
    board.release("c0")
    again = fast("c1", *places, **common, conversation=("h2", (("h1", 9900),), ("s", 8000)))
    assert board.take(again)[1:4] == ["a", "m", "home"]
    board.release("c1")
    terms = {
        term["backend"]: term
        for term in board.preview(replace(again, conversation=("h3", (("h2", 9900),), ("s", 8000))))["places"]
    }
    assert terms["a"]["cached"] == 9900
    assert terms["b"]["cached"] == 0
    other = board.take(fast("c2", *places, **common, conversation=("x1", (), ("s", 8000))))
    assert other[1] == "a", "the beginning of the prompt is cached there"
    board.take(fast("c3", places[0], **common, conversation=("y1", (), ("z", 10))))
    gone = board.take(fast("c4", *places, prompt=100, sticky_ms=600_000, conversation=("h4", (("h2", 90),), ("", 0))))
    assert gone[1] == "b", "to wait for it would take longer than to read the prompt anew"


def test_ties_go_to_the_operators_order_and_tiers_are_kept(board: FleetBoard) -> None:
    assert board.take(fast("c0", At("a", slots=2), At("b", slots=2)))[1] == "a"
    first, second = At("c", tier=1, prefill_us=9000), At("d", tier=2, prefill_us=10)
    assert board.take(fast("c1", first, second, prompt=1000))[1] == "c"
    assert board.take(fast("c2", first, second, prompt=1000))[0] == "wait"
    assert board.take(fast("c3", first, second, prompt=1000, group="other", spill_ms=2000))[1:4] == ["d", "m", "spill"]
    assert board.take(fast("c4", At("e", tier=1, prefill_us=9000), second, prompt=100, spill_ms=9000))[1] == "e"


def test_requests_for_a_model_that_is_loading_join_it_and_no_backend_loads_two(board: FleetBoard) -> None:
    assert board.take(fast("c0", ollama("a", slots=2)))[3] == "load"
    assert board.take(fast("c1", ollama("a", slots=2)))[3] == "join"
    assert board.take(fast("c2", ollama("a", "n")))[0] == "wait"
    board.now += 5000
    board.loaded("a", "m", 5 * GB)
    assert board.field("a", "loading") == "", "what was just loaded stays a while"
    board.now += 10_001
    board.tick()
    assert board.field("a", "loading").split(" ")[0] == "n"
    assert board.granted["c2"][2] == "load"


def test_warm_yields_to_a_backend_that_has_the_model_and_a_free_slot(board: FleetBoard) -> None:
    places = (ollama("a"), ollama("b"))
    board.loaded("b", "m", 5 * GB)
    assert board.take(Ask("c0", places, mode="warm"))[1:4] == ["b", "m", "loaded"]
    assert board.take(Ask("c1", places, mode="warm"))[1:4] == ["a", "m", "load"], "it has no room"
    assert board.take(Ask("c2", (replace(places[0], tier=1), replace(places[1], tier=2)), mode="warm"))[0] == "wait"


def test_a_load_fails_over_to_those_who_joined_it(board: FleetBoard) -> None:
    board.take(fast("c0", ollama("a", slots=2)))
    board.take(fast("c1", ollama("a", slots=2)))
    board.release("c0")
    assert board.field("a", "loading").split(" ")[1] == "c1"
    board.release("c1")
    assert board.field("a", "loading") == ""


def busy_backend(board: FleetBoard) -> None:
    """It has a model in use, which may have to go for one that is loading."""
    board.client.hset("fleet:box:a", mapping={"seen": 20 * GB, "at": board.now})
    board.loaded("a", "big", 20 * GB)
    board.now += 120_000
    assert board.take(fast("c0", ollama("a", "big", 20 * GB, slots=2)))[3] == "loaded"
    assert board.take(fast("c1", ollama("a", "small", 3 * GB)))[3] == "load"


def test_what_may_have_gone_for_a_load_is_unsure_until_the_backend_is_asked(board: FleetBoard) -> None:
    busy_backend(board)
    board.now += 2000
    board.loaded("a", "small", 3 * GB)
    board.release("c1")
    assert board.take(fast("c2", ollama("a", "small", 3 * GB)))[3] == "loaded"
    assert board.take(fast("c3", ollama("a", "medium", 9 * GB)))[0] == "wait", "it is not known whether it fits"
    assert board.take(fast("c4", ollama("a", "big", 20 * GB, slots=2)))[0] == "wait", "it may be gone"
    board.client.hset("fleet:box:a", "at", board.now + 1)
    board.now += 100
    board.tick()
    assert board.granted["c4"][2] == "loaded" and "c3" not in board.granted
    board.release("c0")
    board.release("c4")
    board.now += 60_000
    board.tick()
    assert board.granted["c3"][2] == "load"


def test_after_a_load_that_was_given_up_too(board: FleetBoard) -> None:
    busy_backend(board)
    board.now += 2000
    board.release("c1")
    assert board.take(fast("c2", ollama("a", "big", 20 * GB, slots=2)))[0] == "wait", "it may be gone"
    assert board.take(fast("c3", ollama("a", "medium", 9 * GB)))[0] == "wait"
    board.now += 2001
    board.tick()
    assert board.granted["c2"][2] == "loaded", "a backend that does not answer is waited for no longer than the load took"


@dataclass
class OneBackend:
    """People who always ask for one of two models, which do not fit beside each other on one backend."""

    board: FleetBoard
    sizes: dict[str, int]
    asked: dict[str, int] = field(default_factory=dict)
    waits: dict[str, list[int]] = field(default_factory=dict)
    events: list[tuple[int, str, str, str]] = field(default_factory=list)
    loads: int = 0

    def ask(self, model: str) -> None:
        call = f"c{len(self.asked)}"
        self.asked[call] = self.board.now
        reply = self.board.take(fast(call, ollama("a", model, self.sizes[model], slots=4, service_ms=2000), client=model))
        if reply[0] == "go":
            self.begin(call, model, reply[3])

    def begin(self, call: str, model: str, why: str) -> None:
        self.waits.setdefault(model, []).append(self.board.now - self.asked[call])
        took = 5000 if why == "load" else 0
        if took:
            self.loads += 1
            self.events.append((self.board.now + took, "loaded", call, model))
        self.events.append((self.board.now + took + 2000, "ends", call, model))

    def go_on(self) -> None:
        self.events.sort()
        self.board.now, what, call, model = self.events.pop(0) if self.events else (self.board.now + 1000, "", "", "")
        if what == "loaded":
            for other in self.sizes.keys() - {model}:
                self.board.client.hdel("fleet:box:a", f"r:{other}")
            self.board.loaded("a", model, self.sizes[model])
        elif what == "ends":
            self.board.release(call, 2000)
            self.ask(model)
        self.board.tick()
        for granted, (_, its_model, why) in self.board.granted.items():
            self.begin(granted, its_model, why)
        self.board.granted.clear()


def test_a_model_that_is_nowhere_gets_a_backend_although_others_keep_it_busy(board: FleetBoard) -> None:
    board.client.hset("fleet:box:a", mapping={"seen": 20 * GB, "room": 25 * GB})
    people = OneBackend(board, {"busy": 20 * GB, "other": 10 * GB})
    for model in ("busy", "busy", "busy", "busy", "other"):
        people.ask(model)
    for _ in range(400):
        people.go_on()
    assert people.waits.keys() == {"busy", "other"}
    assert max(map(max, people.waits.values())) < 60_000, "nobody starves"
    assert people.loads < len(people.asked) / 4, "nothing thrashes"


MODELS = {"x": 4 * GB, "y": 9 * GB, "z": 20 * GB}
BOXES = {"a": ("x", "y", "z"), "b": ("x", "y"), "c": ("y", "z")}


class History:
    """Random calls of four processes, of which some are killed."""

    def __init__(self, board: FleetBoard, seed: int) -> None:
        self.board, self.chance = board, random.Random(seed)
        self.slots = {(box, model): self.chance.randint(1, 3) for box, models in BOXES.items() for model in models}
        self.processes = ["p1", "p2", "p3", "p4"]
        self.held: dict[str, tuple[str, str, str]] = {}
        self.waiting: dict[str, str] = {}
        self.calls, self.waited = count(), 0
        self.tick()

    def tick(self) -> None:
        for process in self.processes:
            self.board.tick(process)

    def go_on(self) -> None:
        self.board.now += self.chance.randint(0, 400)
        acts = (self.take, self.release, self.leave, self.kill, self.tick)
        self.chance.choices(acts, weights=(45, 35, 5, 1, 14))[0]()
        for call, (box, model, _) in self.board.granted.items():
            if process := self.waiting.pop(call, ""):
                self.held[call] = process, box, model
        self.board.granted.clear()

    def take(self) -> None:
        model, process = self.chance.choice(list(MODELS)), self.chance.choice(self.processes)
        places = [
            ollama(box, model, MODELS[model], self.chance.randint(500, 5000), slots=self.slots[box, model])
            for box, models in BOXES.items()
            if model in models
        ]
        more = {"client": self.chance.choice("klmn"), "prompt": self.chance.randint(0, 5000), "sticky_ms": 9000}
        ask = fast(f"c{next(self.calls)}", *places, process=process, **more)
        reply = self.asks(ask)
        if reply[0] == "go":
            self.held[ask.id] = process, reply[1], reply[2]
        else:
            self.waiting[ask.id] = process
            self.waited += 1

    def asks(self, ask: Ask) -> list[Any]:
        return self.board.take(ask)

    def release(self) -> None:
        if not self.held:
            return
        call = self.chance.choice(sorted(self.held))
        process, box, model = self.held.pop(call)
        if self.chance.random() < 0.8:
            self.board.loaded(box, model, MODELS[model])
        self.board.release(call, self.chance.randint(0, 3000), process)

    def leave(self) -> None:
        if self.waiting:
            call = self.chance.choice(sorted(self.waiting))
            self.board.release(call, process=self.waiting.pop(call))

    def kill(self) -> None:
        """Its lease ends, and a process with another name takes its place."""
        killed = self.chance.choice(self.processes)
        self.processes.remove(killed)
        self.held = {call: found for call, found in self.held.items() if found[0] != killed}
        self.waiting = {call: process for call, process in self.waiting.items() if process != killed}
        self.processes.append(f"p{next(self.calls)}")
        for _ in range(4):
            self.board.now += LEASE_MS // 3
            self.tick()

    def end(self) -> None:
        for call, (process, _, _) in self.held.items():
            self.board.release(call, process=process)
        for process in self.processes:
            self.board.run("restore", process, 0)


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_never_exceed_slots_nor_load_twice_and_leave_nothing(board: FleetBoard, seed: int) -> None:
    history = History(board, seed)
    for _ in range(600):
        history.go_on()
        running = {place: board.running(*place) for place in history.slots}
        assert all(running[place] <= most for place, most in history.slots.items())
        assert sum(running.values()) == len(history.held)
    assert history.waited > 50, "many wait"
    history.end()
    assert board.names() == set()


def test_many_slots_cost_redis_no_more_than_few(board: FleetBoard) -> None:
    def microseconds(name: str, slots: int) -> float:
        place = At(name, slots=slots)
        board.client.config_resetstat()
        for number in range(40):
            board.take(fast(f"{name} {number}", place, client="alice"))
        stats: Any = board.client.info("commandstats")
        return float(stats["cmdstat_evalsha"]["usec_per_call"])

    few = microseconds("few", 50)
    assert microseconds("many", 10_000) < 3 * few
