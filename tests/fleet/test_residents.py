"""Which models a backend has loaded, from what it lists: as the script keeps it in Redis, and a process without Redis."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import redis

from gateway.dialects import model_entries
from gateway.fleet import presence, residents
from gateway.fleet.llama_server import RoutedModel
from gateway.fleet.residents import BackendLoad, Listed, Loading, Resident
from gateway.stores import redis_keys
from gateway.stores.redis_scripts import read_scripts
from tests.conftest import TestStores

GB = 10**9
BOX, TURN = redis_keys.fleet_box("alpha"), redis_keys.fleet_turn("place", 2.0)
SCRIPT = read_scripts(presence.LUA)["residents"]
INTERVAL_MS = 2000


class Box:
    """The hash of one backend, as polls and the owner of a load write it."""

    def __init__(self, client: "redis.Redis") -> None:
        self._client: Any = client

    def now(self) -> int:
        seconds, micros = self._client.time()
        return int(seconds * 1000 + micros // 1000)

    def poll(self, *listed: Listed, sent: int | None = None, lists_loading: bool = False) -> BackendLoad:
        """The box after an answer; a question that is sent now waits for a new millisecond, as a real one does."""
        if sent is None:
            time.sleep(0.002)
            sent = self.now()
        values = [sent, INTERVAL_MS, int(lists_loading), *residents.arguments(listed)]
        flat: Any = self._client.eval(SCRIPT.text, 2, BOX, TURN, *values)
        assert self.load() == residents.unpack("alpha", dict(zip(flat[::2], flat[1::2], strict=True)))
        return self.load()

    def load(self) -> BackendLoad:
        fields: Any = self._client.hgetall(BOX)
        return residents.unpack("alpha", fields)

    def begin_load(self, model: str) -> None:
        self._client.hset(BOX, "loading", f"{model}\x1fcall-1\x1f{self.now()}\x1f{self.now() + 5000}")

    def end_load(self, model: str) -> None:
        """As a call does with its first token."""
        time.sleep(0.002)
        now = self.now()
        self._client.hdel(BOX, "loading")
        self._client.hset(BOX, f"r:{model}", f"0 {now} {now} 0 0")

    def use(self, model: str, at: int) -> None:
        vram, since, _, until, context = self._client.hget(BOX, f"r:{model}").split()
        self._client.hset(BOX, f"r:{model}", b" ".join((vram, since, str(at).encode(), until, context)))


@pytest.fixture
def box(stores: TestStores) -> Iterator[Box]:
    with stores.client() as client:
        yield Box(client)


def listed(model: str, gigabytes: float, left_s: float | None = 300.0) -> Listed:
    return Listed(model, int(gigabytes * GB) + 5, int(gigabytes * GB), 4096, left_s)


def names(load: BackendLoad) -> list[str]:
    return [resident.model for resident in load.residents]


def test_residents_of_an_answer_with_sizes_times_and_context(box: Box) -> None:
    began = box.now()
    load = box.poll(listed("a", 3), listed("b", 2, None))
    first, second = load.residents
    assert (first.model, first.size, first.size_vram, first.context) == ("a", 3 * GB + 5, 3 * GB, 4096)
    assert began / 1000 <= first.since == first.used <= began / 1000 + 5
    assert first.until == pytest.approx(first.since + 300) and second.until is None
    assert (load.used, load.seen, load.misfit, load.error, load.swaps) == (5 * GB, 5 * GB, 0, "", True)


def test_times_of_known_residents_are_kept_and_those_that_are_gone_leave_nothing(box: Box) -> None:
    since = box.poll(listed("a", 3), listed("b", 2)).residents[0].since
    box.use("a", box.now() + 7000)
    after = box.poll(listed("a", 3))
    assert names(after) == ["a"]
    assert after.residents[0].since == since and after.residents[0].used > since + 6
    assert (after.used, after.seen) == (3 * GB, 5 * GB), "the largest sum that was seen"
    assert box._client.hkeys(BOX).count(b"s:b") == 0


def test_a_load_of_ours_outlives_the_answer_to_an_earlier_question(box: Box) -> None:
    box.poll(listed("a", 3))
    sent = box.now()
    box.end_load("b")
    assert names(box.poll(listed("a", 3), sent=sent)) == ["a", "b"]
    assert names(box.poll(listed("a", 3))) == ["a"], "a later question shows that it is gone"


def test_a_load_of_ours_gets_its_size_and_keeps_its_time(box: Box) -> None:
    box.end_load("b")
    since = box.load().residents[0].since
    (resident,) = box.poll(listed("b", 4)).residents
    assert (resident.size_vram, resident.since, resident.context) == (4 * GB, since, 4096)


def test_the_answer_to_an_older_question_changes_nothing(box: Box) -> None:
    older = box.now()
    time.sleep(0.002)
    newer = box.poll(listed("a", 3))
    assert box.poll(listed("b", 9), sent=older) == newer


def test_a_backend_that_lists_what_it_loads_has_it_loaded_only_when_the_load_is_done(box: Box) -> None:
    box.poll(listed("a", 3))
    box.begin_load("b")
    during = box.poll(listed("a", 3), listed("b", 2), lists_loading=True)
    assert names(during) == ["a"] and during.loading is not None and during.loading.model == "b"
    box.end_load("b")
    assert names(box.poll(listed("a", 3), listed("b", 2), lists_loading=True)) == ["a", "b"]


def test_a_backend_that_lists_only_what_is_loaded_shows_the_end_of_a_load(box: Box) -> None:
    box.begin_load("b")
    assert names(box.poll()) == []
    assert names(box.poll(listed("b", 2))) == ["b"]


@pytest.mark.parametrize("lists_loading", [True, False])
@pytest.mark.parametrize("polls_during", [0, 2])
def test_what_had_to_go_for_a_load_of_ours_did_not_fit(box: Box, polls_during: int, lists_loading: bool) -> None:
    box.poll(listed("a", 3), listed("b", 2))
    box.begin_load("c")
    early = [listed("c", 7)] if lists_loading else []
    for _ in range(polls_during):
        during = box.poll(listed("b", 2), *early, lists_loading=lists_loading)
        assert during.misfit == 0, "the size of what is loaded is not known yet"
    box.end_load("c")
    after = box.poll(listed("b", 2), listed("c", 7), lists_loading=lists_loading)
    assert (after.misfit, after.seen, after.evictions) == (12 * GB, 9 * GB, 1)
    assert box.poll(listed("b", 2), listed("c", 7), lists_loading=lists_loading).misfit == 12 * GB, "it is remembered"
    larger = box.poll(listed("a", 3), listed("b", 2), listed("c", 7), lists_loading=lists_loading)
    assert (larger.misfit, larger.seen) == (0, 12 * GB), "it did fit"


def test_the_smallest_sum_that_did_not_fit_counts(box: Box) -> None:
    for large, misfit in ((9, 12), (8, 11), (10, 11)):
        box.poll(listed("a", 3))
        box.end_load("c")
        assert box.poll(listed("c", large)).misfit == misfit * GB
        box.poll()


def test_what_expired_or_was_unloaded_without_a_load_of_ours_shows_no_limit(box: Box) -> None:
    box.poll(listed("a", 3, 1.0), listed("b", 2))
    box.end_load("c")
    expired = box.poll(listed("b", 2), listed("c", 7))
    assert (expired.misfit, expired.evictions) == (0, 0)
    unloaded = box.poll(listed("c", 7))
    assert (unloaded.misfit, unloaded.evictions) == (0, 1), "somebody unloaded it: nothing was loaded"
    others = box.poll(listed("d", 1))
    assert (others.misfit, others.evictions) == (0, 2), "somebody else's load"


def test_a_load_that_was_given_up_shows_no_limit(box: Box) -> None:
    box.poll(listed("a", 3))
    box.begin_load("c")
    box.poll()
    box._client.hdel(BOX, "loading")
    box.poll()
    box.end_load("d")
    assert box.poll(listed("d", 1)).misfit == 0


def test_without_a_gpu_the_main_memory_counts(box: Box) -> None:
    load = box.poll(Listed("a", 3 * GB, 0, 4096, None), Listed("b", 2 * GB, 0, 4096, None))
    assert (load.used, load.seen, load.residents[0].size_vram) == (5 * GB, 5 * GB, 3 * GB)
    load = box.poll(Listed("a", 3 * GB, GB, 4096, None), Listed("b", 2 * GB, 0, 4096, None))
    assert (load.used, load.seen) == (GB, GB), "with a GPU, only its memory counts"
    load = box.poll(Listed("b", 2 * GB, 0, 4096, None))
    assert (load.used, load.seen) == (0, GB), "also while all models are in main memory"


def test_loads_are_counted_whoever_caused_them(box: Box) -> None:
    assert box.poll(listed("a", 3)).loads == 0, "what was there before"
    assert box.poll(listed("a", 3), listed("b", 1)).loads == 1
    box.end_load("c")
    assert box.poll(listed("a", 3), listed("c", 1)).loads == 2
    box.end_load("a")
    assert box.poll(listed("a", 3), listed("c", 1)).loads == 3, "it went and came back between two questions"
    assert box.poll(listed("a", 3), listed("c", 1)).loads == 3


def test_a_resident_that_counted_as_gone_keeps_its_time_if_it_is_still_there(box: Box) -> None:
    since = box.poll(listed("a", 3)).residents[0].since
    box._client.hdel(BOX, "r:a")
    assert box.poll(listed("a", 3)).residents[0].since == since


@pytest.mark.parametrize(
    "fields",
    [
        {"polled": "no JSON"},
        {"polled": '{"models":{"a":5,"b":{"stays":"x","vram":[]}},"evicted":{}}'},
        {"polled": "[]", "at": "x", "seen": "-", "room": "y", "loads": "z"},
        {"r:a": "x", "r:b": "1 2", "r:c": "", "loading": "", "error": "gone"},
        {"r:a": "1 9999999999999999 1 1 1", "loading": "\x1f\x1f"},
    ],
)
def test_a_box_that_others_have_written_to_harms_nothing(box: Box, fields: dict[str, str]) -> None:
    box._client.hset(BOX, mapping=fields)
    residents.unpack("alpha", {name.encode(): value.encode() for name, value in fields.items()})
    if fields.get("loads") == "z":
        box._client.hdel(BOX, "loads")
    load = box.poll(listed("b", 2))
    assert "b" in names(load) and load.seen == 2 * GB and load.error == ""


def test_what_redis_holds_is_read_with_suspicion() -> None:
    fields = {b"at": b"\xd9\xa3", b"seen": b"9" * 40, b"r:\xff": b"1 2 3 4 5", b"r:x": b"-1 2 3 4 5", b"loading": b"m c 1 x"}
    load = residents.unpack("alpha", fields)
    assert (load.at, load.seen, names(load), load.loading) == (0.0, 0, ["\ufffd"], None)
    many = {f"r:{number}".encode(): b"1 2 3 4 5" for number in range(500)}
    assert len(residents.unpack("alpha", many).residents) == residents.MOST_RESIDENTS


@pytest.mark.parametrize("text", ["m:1\x1fid\x1f1000\x1f2500", "m:1 id 1000 2500", "m:1\x1fid\x1f1000.5\x1f2500.25"])
def test_a_load_in_progress_is_read(text: str) -> None:
    assert residents.unpack("alpha", {b"loading": text.encode()}).loading == Loading("m:1", 1.0, 2.5)


def entries(*models: dict[str, Any]) -> Sequence[dict[str, Any]]:
    return model_entries.read_tags({"models": list(models)})


NOW = 1_795_912_840.0


@pytest.mark.parametrize(
    ("expires_at", "left_s"),
    [
        ("2026-11-29T00:45:40.706015396Z", 300.706015),
        ("2026-11-28T17:45:40-07:00", 300.0),
        ("2026-11-29T00:40:30Z", 0.0),
        ("2318-08-21T18:05:00.0-07:00", None),
        ("0001-01-01T00:00:00Z", None),
        ("x", None),
        (5, None),
        ({}, None),
        (None, None),
    ],
)
def test_when_a_model_goes(expires_at: object, left_s: float | None) -> None:
    (found,) = residents.of_ollama(entries({"name": "A", "expires_at": expires_at}), NOW)
    assert found.model == "a:latest" and found.left_s == (None if left_s is None else pytest.approx(left_s))


def test_what_a_backend_lists_is_bounded() -> None:
    hostile = {"name": "A", "size": -5, "size_vram": 2**60, "context_length": True, "expires_at": "9" * 100_000}
    assert residents.of_ollama(entries(hostile), NOW) == [Listed("a:latest", 0, 0, 0, None)]
    many = entries(*({"name": f"m{number}"} for number in range(1000)))
    assert len(residents.of_ollama(many, NOW)) == residents.MOST_RESIDENTS
    twice = entries({"name": "a", "size_vram": 1}, {"name": "A:latest", "size_vram": 2})
    assert [found.size_vram for found in residents.of_ollama(twice, NOW)] == [2]


def test_a_router_has_loaded_what_it_says() -> None:
    models = {"a": RoutedModel(True, 4, 500, 4096), "b": RoutedModel(False, 4, 0, 0)}
    assert residents.of_router(models) == [Listed("a", 500, 500, 4096, None)]


@pytest.mark.parametrize(
    ("version", "expected"),
    [("0.12.6", True), ("0.32.9", True), ("0.32.10", False), ("v1.0.0-rc1", False), ("", True), ("0.40", True)],
)
def test_since_which_version_ollama_does_not_list_what_it_loads(version: str, expected: bool) -> None:
    assert residents.lists_loading(version) is expected


def test_without_redis_a_process_remembers_as_the_script_does() -> None:
    first = residents.merged(BackendLoad("alpha", True, error="gone"), [listed("a", 3), listed("b", 2)], 9.9, 10.0)
    assert (first.at, first.error, first.seen, first.misfit) == (9.9, "", 5 * GB, 0)
    second = residents.merged(first, [listed("a", 3, None), listed("c", 1)], 11.9, 12.0)
    assert [(one.model, one.since, one.until) for one in second.residents] == [("a", 10.0, None), ("c", 12.0, 312.0)]
    assert (second.used, second.seen) == (4 * GB, 5 * GB)
    late = residents.merged(second, [], 11.95, 12.1)
    assert names(late) == ["c"], "it came after the question"
    assert Resident("a").until is None and not math.isnan(late.at)
