"""What calls cost is learned by backend and model, and estimated where nothing is learned."""

import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.dialect import Usage
from gateway.fleet import costs as costs_module
from gateway.fleet.cost_means import COUNT, DECODE, HALF_LIFE, LOAD, OUTPUT, PREFILL, SERVICE, CostMeans
from gateway.fleet.costs import TYPICAL, TYPICAL_LOAD_S, TYPICAL_SIZE, Costs
from gateway.fleet.observation import Observation
from gateway.fleet.output_lengths import OutputLengths

GB = 10**9


def call(prefill_tps: float = 2000, decode_tps: float = 50, load_s: float | None = None, **more: Any) -> Observation:
    """A call of 1000 tokens and an answer of 100."""
    prefill_s, decode_s = 1000 / prefill_tps, 100 / decode_tps
    usage = Usage(1000, 100, 0, load_s, prefill_s, decode_s)
    took_s = prefill_s + decode_s + (load_s or 0.0)
    return Observation(took_s, None, 1000, 100, usage, **{"loaded": load_s is not None, **more})


def only(kind: int, value: float) -> list[float | None]:
    values: list[float | None] = [None] * COUNT
    values[kind] = value
    return values


def taught(*calls: tuple[str, str, Observation], times: int = 1) -> Costs:
    costs = Costs()
    for backend, model, seen in calls * times:
        costs.note(backend, model, seen)
    return costs


# ── means ──


def test_a_mean_is_exact_from_the_first_observation_on() -> None:
    costs = taught(("a", "m", call(2000, 50, 4.0)))
    found = costs.rates("a", "m")
    assert found[:5] == pytest.approx((4.0, 2000, 50, 100, 2.5))
    assert found.is_learned and set(found.origins[:5]) == {"learned"}


def test_half_of_the_weight_is_that_of_the_last_twenty() -> None:
    costs = taught(("a", "m", call(2000, 50)), times=300)
    for _ in range(HALF_LIFE):
        costs.note("a", "m", call(1000, 100))
    found = costs.rates("a", "m")
    # Rates are averaged as factors.
    assert found.prefill_tps == pytest.approx(math.sqrt(2000 * 1000), rel=0.001)
    assert found.decode_tps == pytest.approx(math.sqrt(50 * 100), rel=0.001)


def test_a_new_speed_is_learned() -> None:
    costs = taught(("a", "m", call(2000, 50)), times=100)
    for _ in range(6 * HALF_LIFE):
        costs.note("a", "m", call(100, 500))
    found = costs.rates("a", "m")
    assert found.prefill_tps == pytest.approx(100, rel=0.1) and found.decode_tps == pytest.approx(500, rel=0.1)


def test_one_strange_call_changes_little() -> None:
    costs = taught(("a", "m", call()), times=100)
    costs.note("a", "m", call(prefill_tps=1e9, decode_tps=0.01))
    found = costs.rates("a", "m")
    assert found.prefill_tps == pytest.approx(2000, rel=0.08) and found.decode_tps == pytest.approx(50, rel=0.08)
    assert found.service_s < 3.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e300])
@pytest.mark.parametrize("kind", [LOAD, PREFILL, SERVICE, OUTPUT])
def test_what_is_no_number_is_not_learned(kind: int, value: float) -> None:
    means = CostMeans()
    assert not means.add(only(kind, value))
    assert means.mean(kind) is None


def test_only_a_length_may_be_zero() -> None:
    means = CostMeans()
    assert means.add(only(OUTPUT, 0)) and not means.add(only(DECODE, 0.0))
    assert means.mean(OUTPUT) == 0


# ── sums of several processes ──


@given(st.lists(st.tuples(st.booleans(), st.floats(0.01, 1e5)), max_size=60))
def test_no_observation_is_lost_when_processes_add_up(observed: list[tuple[bool, float]]) -> None:
    """As `merge_costs.lua` does: the weights show that each counts, and the mean stays between the values."""
    one, other = CostMeans(), CostMeans()
    for is_of_one, value in observed:
        (one if is_of_one else other).add(only(PREFILL, value))
    text = merged(merged(b"", one), other)
    everybody = CostMeans()
    assert everybody.replace(text)
    alone = CostMeans()
    for _, value in observed:
        alone.add(only(PREFILL, value))
    assert everybody.known.weights[PREFILL] == pytest.approx(alone.known.weights[PREFILL])
    mean = everybody.mean(PREFILL)
    if not observed:
        assert mean is None
    else:
        assert mean is not None
        assert min(v for _, v in observed) * 0.999 <= mean <= max(v for _, v in observed) * 1.001


def merged(text: bytes, means: CostMeans) -> bytes:
    """The text after a process has added its own, computed here."""
    _, own = means.take_own()
    numbers, sums = [float(word) for word in own.split()], [float(word) for word in text.split()] or [0.0] * 14
    for kind in range(6):
        count, value, weight = numbers[2 + 3 * kind : 5 + 3 * kind]
        decay = 0.5 ** (count / HALF_LIFE)
        sums[2 + 2 * kind] = sums[2 + 2 * kind] * decay + value
        sums[3 + 2 * kind] = sums[3 + 2 * kind] * decay + weight
    return " ".join(map(repr, [*numbers[:2], *sums[2:]])).encode()


def test_what_could_not_be_shared_is_put_back_before_what_came_later() -> None:
    means, whole = CostMeans(), CostMeans()
    values = [100.0, 200.0, 300.0, 400.0]
    for value in values:
        whole.add(only(PREFILL, value))
    means.add(only(PREFILL, values[0]))
    means.add(only(PREFILL, values[1]))
    taken, _ = means.take_own()
    means.add(only(PREFILL, values[2]))
    means.put_back(taken)
    means.add(only(PREFILL, values[3]))
    assert means.own == whole.own and means.known == whole.known


@pytest.mark.parametrize(
    "text",
    [b"", b"x", b"1", b"nan 0", b"0 inf", b"1e300 0", b"0 0 x", b"\xff\xfe", b"{}"],
)
def test_redis_may_hold_anything(text: bytes) -> None:
    assert not CostMeans().replace(text)


@pytest.mark.parametrize("pair", ["5 0.5", "5 -1", "5 1000", "-1000 2", "1e14 1", "99999 1"])
def test_sums_that_no_gateway_wrote_are_left_out(pair: str) -> None:
    means = CostMeans()
    assert means.replace(f"0 0 {pair}".encode())
    assert means.mean(LOAD) is None


def test_a_version_with_more_or_fewer_kinds_is_understood() -> None:
    means = CostMeans()
    assert means.replace(b"7 1.5 0.0 1.0") and means.mean(LOAD) == 1.0 and means.mean(OUTPUT) is None
    assert means.replace(b"7 1.5 " + b"0.0 1.0 " * 9) and means.mean(OUTPUT) == 0.0
    assert means.size == 7 and means.at == 1.5


# ── estimates where nothing is learned ──


def test_a_fleet_that_has_answered_nothing() -> None:
    found = Costs().rates("a", "m")
    assert found[:6] == tuple(TYPICAL[kind] for kind in costs_module.KINDS)
    assert set(found.origins) == {"default"} and not found.is_learned
    assert Costs().rates("a", "m", 2 * TYPICAL_SIZE).load_s == 2 * TYPICAL_LOAD_S


def test_the_median_of_the_model_elsewhere_then_of_the_backend_then_of_all() -> None:
    costs = taught(
        ("a", "m", call(1000, 10)),
        ("b", "m", call(2000, 20)),
        ("c", "m", call(9000, 90)),
        ("a", "n", call(5000, 7)),
    )
    elsewhere = costs.rates("d", "m")
    assert elsewhere[1:3] == pytest.approx((2000, 20)) and elsewhere.origins[1:3] == ("model", "model")
    other = costs.rates("a", "x")
    assert other[1:3] == pytest.approx((3000, 8.5)) and other.origins[1:3] == ("backend", "backend")
    nowhere = costs.rates("d", "x")
    assert nowhere[1:3] == pytest.approx((3500, 15)) and nowhere.origins[1:3] == ("fleet", "fleet")
    assert not elsewhere.is_learned


def test_a_load_is_estimated_from_the_size_and_the_speed_of_the_backend() -> None:
    costs = taught(("a", "m", call(load_s=4.0, size=8 * GB)), ("b", "m", call(load_s=8.0, size=8 * GB)))
    found = costs.rates("a", "x", 20 * GB)
    assert found.load_s == pytest.approx(10.0) and found.origins[0] == "size"
    assert costs.rates("c", "m", 8 * GB).load_s == pytest.approx(6.0), "the median of the model elsewhere"
    assert costs.rates("c", "x", 3 * GB).load_s == pytest.approx(2.0), "the median speed of all backends"
    assert costs.rates("a", "x").load_s == pytest.approx(4.0), "without a size, that of the backend's other models"
    assert costs.rates("a", "x", 10 * GB).load_s == pytest.approx(5.0), "another size is another estimate"


def test_estimates_follow_what_is_learned_later() -> None:
    costs = Costs()
    assert costs.rates("b", "m").decode_tps == TYPICAL[DECODE]
    costs.note("a", "m", call(decode_tps=80))
    assert costs.rates("b", "m").decode_tps == pytest.approx(80)
    assert costs.rates("a", "m").decode_tps == pytest.approx(80)


def test_a_look_up_takes_microseconds() -> None:
    costs = taught(*(("a", f"m{number}", call()) for number in range(100)))
    costs.rates("a", "m7", 5)
    began = time.perf_counter()
    for _ in range(1000):
        costs.rates("a", "m7", 5)
        costs.predicted_output("k", "m7", 100)
    assert (time.perf_counter() - began) / 1000 < 0.000_1


def test_the_number_of_models_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs_module, "MOST_ENTRIES", 3)
    costs = taught(*(("a", f"m{number}", call()) for number in range(10)))
    assert [row.model for row in costs.learned()] == ["m7", "m8", "m9"]
    for number in range(100):
        costs.rates("a", f"x{number}")
    assert len(costs._rates) <= 12


def test_all_that_is_learned_can_be_listed() -> None:
    costs = taught(("b", "m", call(load_s=4.0, size=8 * GB)), ("a", "n", call(prefill_tps=500)))
    first, second = costs.learned()
    assert (first.backend, first.model, first.load_s, first.size) == ("a", "n", None, 0)
    assert (second.backend, second.model, second.size) == ("b", "m", 8 * GB)
    assert second.load_s == pytest.approx(4.0) and second.at == pytest.approx(time.time(), abs=5)


# ── lengths of answers ──


def test_a_key_that_uses_what_it_needs_is_predicted_by_its_mean() -> None:
    lengths = OutputLengths()
    for most in (1000, 4000, 500, 8000) * 5:
        lengths.add("k", "m", 120, most)
    assert lengths.predicted("k", "m", 2000) == pytest.approx(120)
    assert lengths.predicted("k", "m", None) == pytest.approx(120)
    assert lengths.predicted("k", "m", 50) == 50


def test_a_key_whose_limits_fit_is_predicted_by_them() -> None:
    lengths = OutputLengths()
    for most in (1000, 4000, 500, 8000) * 5:
        lengths.add("k", "m", most * 9 // 10, most)
    assert lengths.predicted("k", "m", 2000) == pytest.approx(1800)


def test_a_key_that_has_not_used_the_model_gets_the_median_of_all() -> None:
    costs = taught(("a", "m", call(key_id="k", asked_model="m", most_output=None)))
    assert costs.predicted_output("k", "m", None) == pytest.approx(100)
    assert costs.predicted_output("other", "m", None) == pytest.approx(100)
    assert costs.predicted_output("other", "m", 20) == 20
    assert costs.predicted_output("other", "x", None) == TYPICAL[OUTPUT]
    assert costs.predicted_output("other", "x", 0) == 0


def test_only_the_keys_that_were_used_last_are_remembered() -> None:
    lengths = OutputLengths(remembered=3)
    for key in ("a", "b", "c", "a", "d"):
        lengths.add(key, "m", 10, None)
    assert len(lengths) == 3
    assert lengths.predicted("b", "m", None) is None and lengths.predicted("a", "m", None) == pytest.approx(10)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.one_of(st.none(), st.integers(0, 10**6))), min_size=1, max_size=40))
def test_a_prediction_is_always_a_number_within_the_limit(calls: list[tuple[int, int | None]]) -> None:
    lengths = OutputLengths()
    for output, most in calls:
        lengths.add("k", "m", output, most)
    for most in (None, 0, 1, 10**6):
        found = lengths.predicted("k", "m", most)
        assert found is not None and 0 <= found <= (10**6 if most is None else most)
