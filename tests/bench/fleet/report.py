"""The tables and the JSON of a run."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from tests.bench.fleet.figures import ALL
from tests.bench.fleet.goals import ALONE, FAIRNESS, PROCESSOR, Goal, Results
from tests.bench.fleet.runs import Result
from tests.bench.report import aligned

HEAD = ("", "calls", "failed", "TTFT p50", "p95", "tokens/s", "loads", "cached", "late p99")
# Timers of the machines that are so late leave their mark on the figures.
LATE_S = 0.5
MARKS = {True: "met", False: "NOT met", None: "-"}


def tables(results: Results) -> str:
    return "\n\n".join(table(results, scenario) for scenario in results.scenarios() if scenario not in (FAIRNESS, PROCESSOR))


def table(results: Results, scenario: str) -> str:
    """Medians of the rounds; TTFT in the scenario's seconds, of each group as p50/p95."""
    groups = [group for group in results.groups(scenario) if group != ALL]
    rows = [[*HEAD, *groups]]
    for subject in results.subjects(scenario):
        rows += [_row(results, scenario, subject, variant, groups) for variant in ("", ALONE)]
    late = [
        subject
        for subject in results.subjects(scenario)
        if (results.median(scenario, subject, "fleet", "late_p99") or 0) > LATE_S
    ]
    disturbed = f"\ndisturbed, as the processors were busy: {', '.join(late)}" if late else ""
    return f"{scenario}\n{aligned([row for row in rows if row])}{disturbed}"


def _row(results: Results, scenario: str, subject: str, variant: str, groups: Sequence[str]) -> list[str]:
    if not results.all_of(scenario, subject, variant):
        return []
    of = partial(results.median, scenario, subject, variant=variant)
    failed = (of("groups", ALL, "failed") or 0) + (of("groups", ALL, "unfinished") or 0)
    cells = [
        shown(of("groups", ALL, "requests"), 0),
        shown(failed, 0),
        shown(of("groups", ALL, "ttft_p50"), 2),
        shown(of("groups", ALL, "ttft_p95"), 2),
        shown(of("groups", ALL, "tokens_s"), 0),
        shown(of("fleet", "loads"), 0),
        shown((of("fleet", "cached") or 0) * 100, 0) + " %",
        shown(of("fleet", "late_p99"), 2),
    ]
    waits = [f"{shown(of('groups', group, 'ttft_p50'), 1)}/{shown(of('groups', group, 'ttft_p95'), 1)}" for group in groups]
    return [f"{subject} {variant}".strip(), *cells, *waits]


def shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def goals_table(goals: Sequence[Goal]) -> str:
    rows = [["goal", "is to be", "is", "", "stretch", ""]]
    for goal in goals:
        stretch = ("", "") if goal.stretch is None else (f"{goal.sign} {goal.stretch:.3g}", MARKS[goal.is_stretched])
        wanted = f"{goal.sign} {goal.wanted:.3g}"
        rows.append([f"{goal.scenario}: {goal.name}", wanted, shown(goal.found, 2), MARKS[goal.is_met], *stretch])
    notes = [f"{goal.scenario}: {goal.name}: {goal.note}" for goal in goals if goal.note]
    return "\n".join([aligned(rows), *notes])


def as_json(results: Sequence[Result], goals: Sequence[Goal], arguments: dict[str, Any]) -> str:
    machine = {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    reached = [{**asdict(goal), "met": goal.is_met, "stretched": goal.is_stretched} for goal in goals]
    content = {"machine": machine, "arguments": arguments, "goals": reached, "runs": list(results)}
    return json.dumps(content, indent=1, default=str) + "\n"
