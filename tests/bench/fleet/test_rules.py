"""The rules of others, the figures and the goals: pure functions."""

import itertools
from typing import Any

import pytest

from tests.bench.fleet import chart, goals, report
from tests.bench.fleet.rules import RULES, Request, Upstream
from tests.bench.fleet.runs import subject_of

URLS = ("a", "b", "c")


def upstreams(*in_flight: int, loaded: str = "") -> list[Upstream]:
    return [Upstream(url, {"m"}, {"m"} if url in loaded else set(), count) for url, count in zip(URLS, in_flight, strict=True)]


def chosen(rule: str, able: list[Upstream], *openings: str) -> list[str]:
    choose = RULES[rule](URLS)
    return [choose(able, Request("m", opening)).url for opening in openings or ("hello",)]


def test_first_and_least_and_round_robin() -> None:
    assert chosen("first", upstreams(5, 0, 0)) == ["a"]
    assert chosen("least", upstreams(2, 1, 1)) == ["b"]
    assert chosen("rr", upstreams(0, 0, 0), *"1234") == ["a", "b", "c", "a"]
    assert set(chosen("random", upstreams(0, 0, 0), *map(str, range(99)))) == set(URLS)


def test_warm_prefers_what_is_loaded_and_then_the_least() -> None:
    assert chosen("warm", upstreams(9, 2, 3, loaded="bc")) == ["b"]
    assert chosen("warm", upstreams(1, 0, 3)) == ["b"]


def test_bounded_hashing_keeps_conversations_together_until_their_backend_is_full() -> None:
    idle = upstreams(0, 0, 0)
    homes = chosen("chwbl", idle, *map(str, range(60)))
    assert homes == chosen("chwbl", idle, *map(str, range(60))) and set(homes) == set(URLS)
    home = homes[0]
    busy = [Upstream(url, {"m"}, set(), 6 if url == home else 1) for url in URLS]
    assert chosen("chwbl", busy, "0") != [home]


def test_subjects_are_named_as_on_the_command_line() -> None:
    assert subject_of("gateway-fast-4").workers == 4 and subject_of("gateway-order").routing == "order"
    assert subject_of("warm").rule == "warm" and subject_of("gateway-warm").routing == "warm"
    assert subject_of("ours=http://127.0.0.1:8080/").url == "http://127.0.0.1:8080"
    for wrong in ("fast", "gateway-quick", "gateway-fast-x"):
        with pytest.raises(ValueError, match=wrong):
            subject_of(wrong)


def result(subject: str, p95: float, loads: int, variant: str = "", scenario: str = "office") -> dict[str, Any]:
    group = {"requests": 9, "failed": 0, "unfinished": 0, "ttft_p50": p95 / 2, "ttft_p95": p95, "tokens_s": 100 / p95}
    fleet = {"loads": loads, "cached": 0.5, "late_p99": 0.1, "over_slots": [], "most_loads_at_once": 1}
    gateway = {"eta": {"median_error": 0.2}, "cpu_ms_per_request": p95} if subject.startswith("gateway") else {}
    served = {"alice": {"calls": 30, "seconds": 40.0, "dearest": 2.0}, "bob": {"calls": 9, "seconds": 44.0, "dearest": 4.0}}
    groups = {"all": group, "chat": group}
    return {"scenario": scenario, "subject": subject, "variant": variant, "round": 0, "groups": groups} | {
        "fleet": fleet,
        "gateway": gateway,
        "served": served,
    }


RUNS = [
    result("warm", 12, 8),
    result("rr", 30, 20),
    result("gateway-fast", 3, 8),
    result("gateway-fast-4", 4.5, 9),
    result("gateway-fast", 2, 5, goals.ALONE),
    result("gateway-fast", 1.2, 5, scenario=goals.PROCESSOR),
    result("gateway-order", 1.0, 5, scenario=goals.PROCESSOR),
    result("gateway-fast", 1, 1, scenario=goals.FAIRNESS),
]


def test_goals_compare_with_the_best_of_the_others() -> None:
    reached = {f"{goal.scenario}: {goal.name}": goal for goal in goals.goals(goals.Results(RUNS))}
    expected = {
        "office: gateway-fast: TTFT p95 against the best of the others": (0.25, True, False),
        "office: gateway-fast: tokens/s against the most of the others": (4.0, True, True),
        "office: gateway-fast: model loads against the fewest of the others": (1.0, True, False),
        "office: gateway-fast-4: model loads against the fewest of the others": (1.125, False, False),
        "office: four processes against one: TTFT p95": (1.5, False, False),
        "office: chat beside the batch job: TTFT p95 against without": (1.5, True, False),
        "office: ETA: median error": (0.2, True, False),
        "office: models with more calls at once than slots": (0, True, None),
        "fairness: gateway-fast: two backlogged keys 100 : 1, difference in dearest calls": (1.0, True, None),
        "processor: CPU per request, fast against order": (1.2, False, None),
    }
    found = {name: [reached[name].is_met, reached[name].is_stretched] for name in expected}
    assert found == {name: marks for name, (_, *marks) in expected.items()}
    assert [reached[name].found for name in expected] == pytest.approx([ratio for ratio, *_ in expected.values()])


def test_reports_have_every_subject_and_goal() -> None:
    results = goals.Results(RUNS)
    text = report.tables(results) + report.goals_table(goals.goals(results))
    drawn = chart.svg(results)
    for subject in ("warm", "rr", "gateway-fast", "gateway-fast-4"):
        assert subject in text and subject in drawn
    assert "gateway-fast without batch" in text and "NOT met" in text
    assert report.as_json(RUNS, goals.goals(results), {}).count('"stretched"') == len(goals.goals(results))


def test_medians_are_over_the_rounds() -> None:
    results = goals.Results([result("warm", p95, 1) for p95 in (1, 9, 2)])
    assert results.median("office", "warm", "groups", "all", "ttft_p95") == 2
    assert list(itertools.chain(results.scenarios(), results.subjects("office"))) == ["office", "warm"]
