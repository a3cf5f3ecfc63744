"""The goals: this gateway against the best of the others in the same run."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from tests.bench.fleet.figures import ALL
from tests.bench.fleet.runs import Result

RIVALS = ("random", "rr", "least", "warm", "chwbl")
OURS, OURS_IN_FOUR, ORDER = "gateway-fast", "gateway-fast-4", "gateway-order"
ALONE, WALL = "without batch", "wall clock"
FAIRNESS, PROCESSOR = "fairness", "processor"
ROUNDING = 1e-9
# The bound of docs/fleet.md for the two slots of the probe.
FAIR_CALLS = 2 + 4 * 2


@dataclass(frozen=True)
class Goal:
    scenario: str
    name: str
    sign: Literal["≤", "≥"]
    wanted: float
    found: float | None
    stretch: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """None where there was nothing to compare."""
        return self._holds(self.wanted)

    @property
    def is_stretched(self) -> bool | None:
        return self._holds(self.stretch)

    def _holds(self, bound: float | None) -> bool | None:
        if self.found is None or bound is None:
            return None
        return self.found <= bound + ROUNDING if self.sign == "≤" else self.found >= bound - ROUNDING


class Results:
    """Looks up medians over the rounds."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._results = results

    def scenarios(self) -> list[str]:
        return list(dict.fromkeys(result["scenario"] for result in self._results))

    def subjects(self, scenario: str) -> list[str]:
        return list(dict.fromkeys(result["subject"] for result in self._of(scenario)))

    def groups(self, scenario: str) -> list[str]:
        return list(dict.fromkeys(name for result in self._of(scenario) for name in result["groups"]))

    def median(self, scenario: str, subject: str, *path: str, variant: str = "") -> float | None:
        values = [at(result, path) for result in self.all_of(scenario, subject, variant)]
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        return statistics.median(numbers) if numbers else None

    def all_of(self, scenario: str, subject: str, variant: str = "") -> list[Result]:
        return [one for one in self._of(scenario) if (one["subject"], one["variant"]) == (subject, variant)]

    def best(self, scenario: str, choose: Callable[[Sequence[float]], float], *path: str) -> float | None:
        values = [self.median(scenario, rival, *path) for rival in RIVALS]
        known = [value for value in values if value is not None]
        return choose(known) if known else None

    def _of(self, scenario: str) -> list[Result]:
        return [result for result in self._results if result["scenario"] == scenario]


def at(result: Result, path: Sequence[str]) -> Any:
    value: Any = result
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def goals(results: Results) -> list[Goal]:
    return [goal for scenario in results.scenarios() for goal in _goals_of(results, scenario)]


def _goals_of(results: Results, scenario: str) -> Iterator[Goal]:
    if scenario == FAIRNESS:
        yield from _fairness(results)
    elif scenario == PROCESSOR:
        yield from _processor(results)
    else:
        yield from _against_the_best(results, scenario)
        yield from _light_beside_batch(results, scenario)
        yield from _eta(results, scenario)
        yield from _limits(results, scenario)


def _against_the_best(results: Results, scenario: str) -> Iterator[Goal]:
    for subject in (OURS, OURS_IN_FOUR):
        if not results.all_of(scenario, subject):
            continue
        ours = partial(results.median, scenario, subject)
        waited, tokens, loads = ("groups", ALL, "ttft_p95"), ("groups", ALL, "tokens_s"), ("fleet", "loads")
        ratio = divided(ours(*waited), results.best(scenario, min, *waited))
        yield at_most(scenario, f"{subject}: TTFT p95 against the best of the others", ratio, 1 / 3, 1 / 5)
        ratio = divided(ours(*tokens), results.best(scenario, max, *tokens))
        yield at_least(scenario, f"{subject}: tokens/s against the most of the others", ratio, 1.0, 1.15)
        ratio = divided(ours(*loads), results.best(scenario, min, *loads))
        yield at_most(scenario, f"{subject}: model loads against the fewest of the others", ratio, 1.0, 0.7)
    if results.all_of(scenario, OURS_IN_FOUR):
        one, four = (results.median(scenario, subject, *waited) for subject in (OURS, OURS_IN_FOUR))
        yield at_most(scenario, "four processes against one: TTFT p95", divided(four, one), 1.2, 1.0)


def _light_beside_batch(results: Results, scenario: str) -> Iterator[Goal]:
    """Each group that is no batch job, beside it and without it."""
    for result in results.all_of(scenario, OURS, ALONE)[:1]:
        for group in result["groups"]:
            if group != ALL:
                path = ("groups", group, "ttft_p95")
                beside = results.median(scenario, OURS, *path)
                alone = results.median(scenario, OURS, *path, variant=ALONE)
                yield at_most(
                    scenario, f"{group} beside the batch job: TTFT p95 against without", divided(beside, alone), 2.0, 1.3
                )


def _eta(results: Results, scenario: str) -> Iterator[Goal]:
    for variant in (WALL, ""):
        error = results.median(scenario, OURS, "gateway", "eta", "median_error", variant=variant)
        if error is not None or (variant == WALL and results.all_of(scenario, OURS, WALL)):
            yield at_most(scenario, f"ETA: median error{', ' + variant if variant else ''}", error, 0.30, 0.15)


def _limits(results: Results, scenario: str) -> Iterator[Goal]:
    """What must hold in every run of ours."""
    runs = [run for subject in (OURS, OURS_IN_FOUR) for run in results.all_of(scenario, subject)]
    if not runs:
        return
    over = sorted({entry for run in runs for entry in run["fleet"]["over_slots"]})
    yield at_most(scenario, "models with more calls at once than slots", len(over), 0, note="; ".join(over))
    yield at_most(scenario, "most loads of a box at once", max(run["fleet"]["most_loads_at_once"] for run in runs), 1)
    failed = sum(run["groups"][ALL]["failed"] + run["groups"][ALL]["unfinished"] for run in runs)
    yield at_most(scenario, "calls failed or unfinished", failed, 0)


def _fairness(results: Results) -> Iterator[Goal]:
    """What two keys with enough to do were served, compared with the bound of weighted cost."""
    for subject in results.subjects(FAIRNESS):
        runs = results.all_of(FAIRNESS, subject)
        served = [list(run["served"].values()) for run in runs]
        calls = [abs(one["seconds"] - other["seconds"]) / max(one["dearest"], other["dearest"], 1e-9) for one, other in served]
        note = "; ".join(f"{key} {of['seconds']:.1f} s in {of['calls']} calls" for key, of in runs[0]["served"].items())
        name = f"{subject}: two backlogged keys 100 : 1, difference in dearest calls"
        yield at_most(FAIRNESS, name, statistics.median(calls), FAIR_CALLS, note=note)


def _processor(results: Results) -> Iterator[Goal]:
    path = ("gateway", "cpu_ms_per_request")
    fast, order = (results.median(PROCESSOR, subject, *path) for subject in (OURS, ORDER))
    note = f"{fast or 0:.2f} ms against {order or 0:.2f} ms"
    yield at_most(PROCESSOR, "CPU per request, fast against order", divided(fast, order), 1.15, note=note)


def divided(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def at_most(scenario: str, name: str, found: float | None, most: float, stretch: float | None = None, note: str = "") -> Goal:
    return Goal(scenario, name, "≤", most, found, stretch, note)


def at_least(scenario: str, name: str, found: float | None, least: float, stretch: float | None = None) -> Goal:
    return Goal(scenario, name, "≥", least, found, stretch)
