"""`python -m tests.bench.fleet`: runs the scenarios through all subjects, prints tables and goals, writes JSON and a chart."""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.fleet import chart, goals, report, scenario
from tests.bench.fleet.installation import Installation, can_route
from tests.bench.fleet.programs import CannotRun
from tests.bench.fleet.runs import Job, Progress, Result, Runner, Subject, run_everything, subject_of
from tests.bench.fleet.scenario import Scenario

RESULTS = Path(__file__).resolve().parent.parent / "results"
FULLY_COMPARED = ("office", "homelab")
OURS = ("gateway-order", "gateway-warm", "gateway-fast", "gateway-fast-4")
SCENARIOS = ("office", "homelab", "one-big-box", "equals", "slow-first", goals.FAIRNESS, goals.PROCESSOR)
OF_PROBES = {goals.FAIRNESS: (goals.OURS,), goals.PROCESSOR: (goals.OURS, goals.ORDER)}


def main() -> int:
    arguments = parser().parse_args()
    began = time.monotonic()
    progress: Progress = lambda words: print(f"{time.monotonic() - began:5.0f} s  {words}", file=sys.stderr, flush=True)  # noqa: E731
    try:
        found = [scenario.read(scenario.find(name)) for name in listed(arguments.scenario) or SCENARIOS]
        jobs = list(plan(found, arguments))
        results = measure(jobs, arguments, progress)
    except (CannotRun, ValueError, OSError) as failure:
        print(f"cannot measure: {failure}", file=sys.stderr)
        return 1
    looked_up = goals.Results(results)
    reached = goals.goals(looked_up)
    print(report.tables(looked_up), "", report.goals_table(reached), sep="\n")
    if arguments.json:
        kept = {name: value for name, value in vars(arguments).items() if name not in ("json", "svg")}
        arguments.json.write_text(report.as_json(results, reached, kept), encoding="utf-8")
    if arguments.svg:
        arguments.svg.write_text(chart.svg(looked_up), encoding="utf-8")
    progress("done")
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.bench.fleet", description=__doc__)
    made.add_argument("--scenario", help=f"names or files, separated by commas; without it {', '.join(SCENARIOS)}")
    made.add_argument("--rules", help=f"subjects, separated by commas: {', '.join((*goals.RIVALS, 'first', *OURS))}")
    made.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="a server in front of the boxes at --base-port"
    )
    made.add_argument("--keys", type=Path, help="the secrets of that server's keys, by name, as a JSON object")
    made.add_argument("--base-port", type=int, default=21000, help="port of the first box for --url; the others follow (21000)")
    made.add_argument("--rounds", type=int, default=1, help="how often, each with other people (1)")
    made.add_argument("--speed", type=float, default=20, help="seconds of a scenario in one second (20)")
    made.add_argument("--seed", type=int, default=1, help="of the people's random numbers (1)")
    made.add_argument("--side-by-side", type=int, default=3, help="runs at the same time (3); 1 measures more exactly")
    made.add_argument("--durations", choices=("own", "wall"), default="own", help="the clock of what boxes report (own)")
    made.add_argument(
        "--no-variants", action="store_true", help="leave out the runs without batch jobs and with the wall's clock"
    )
    made.add_argument(
        "--box-program", default="", metavar="FILE", help="another program that plays a box: FILE PORT --models …"
    )
    made.add_argument("--json", type=Path, help="file for all figures")
    made.add_argument("--svg", type=Path, help="file for the chart")
    return made


def plan(found: Sequence[Scenario], arguments: argparse.Namespace) -> Iterator[Job]:
    for number in range(arguments.rounds):
        for one in found:
            for subject in subjects(one, arguments):
                yield Job(subject, one, number, durations=arguments.durations)
                if subject.name == goals.OURS and not arguments.no_variants:
                    yield from variants(subject, one, number, arguments.durations)


def variants(subject: Subject, one: Scenario, number: int, durations: scenario.Durations) -> Iterator[Job]:
    if one.batch_groups() and one.name not in OF_PROBES:
        yield Job(subject, one, number, goals.ALONE, tuple(one.batch_groups()), durations)
    if one.name == FULLY_COMPARED[0] and durations == "own":
        yield Job(subject, one, number, goals.WALL, durations="wall")


def subjects(one: Scenario, arguments: argparse.Namespace) -> list[Subject]:
    names = listed(arguments.rules)
    if not names and not arguments.url:
        names = [*OF_PROBES.get(one.name, (*goals.RIVALS, *OURS))]
        if one.name in SCENARIOS and one.name not in (*FULLY_COMPARED, *OF_PROBES):
            names = [*goals.RIVALS, goals.OURS, goals.OURS_IN_FOUR]
        if not can_route():
            names = [*dict.fromkeys(goals.ORDER if name.startswith("gateway-") else name for name in names)]
    return [subject_of(name) for name in (*names, *arguments.url)]


def listed(names: str | None) -> list[str]:
    return [name for name in (names or "").split(",") if name]


def measure(jobs: Sequence[Job], arguments: argparse.Namespace, progress: Progress) -> list[Result]:
    keys = {key for job in jobs for key in job.scenario.key_names()}
    progress(f"{len(jobs)} runs, {arguments.side_by_side} side by side, {arguments.speed:g} times as fast")
    with Installation(keys) as installation:
        foreign_keys = json.loads(arguments.keys.read_text()) if arguments.keys else {}
        numbers = arguments.speed, arguments.seed, arguments.base_port
        runner = Runner(installation, *numbers, foreign_keys, arguments.box_program)
        return run_everything(runner, jobs, arguments.side_by_side, progress)


if __name__ == "__main__":
    sys.exit(main())
