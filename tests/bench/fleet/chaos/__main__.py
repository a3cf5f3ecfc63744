"""`python -m tests.bench.fleet.chaos --minutes 10`: kills at random what serves calls, and checks that the promises hold.

Two gateways with two processes each share a PostgreSQL, a Redis and three simulated machines. Ends with 1 if a promise was
broken.
"""

import argparse
import shutil
import sys
from pathlib import Path

from tests.bench.fleet.chaos.checks import Findings
from tests.bench.fleet.chaos.kills import Event
from tests.bench.fleet.chaos.run import Plan, run
from tests.support import memory_folder


def table(findings: Findings, events: list[Event]) -> str:
    happened = [f"{event.began:.2f}–{event.ended:.2f} {event.kind}: {event.what}" for event in events]
    width = max(map(len, findings.figures))
    lines = [f"{name:{width}}  {value}" for name, value in findings.figures.items()]
    return "\n".join([*happened, "", *lines, "", *(f"VIOLATION {text}" for text in findings.violations)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--outage-every", type=float, default=120, help="seconds between outages of Redis")
    parser.add_argument("--settled", type=float, default=60, help="seconds after an outage until all is exact again")
    parser.add_argument("--keep", type=Path, help="a folder for the logs")
    words = parser.parse_args()
    folder = words.keep or memory_folder.new_folder()
    folder.mkdir(exist_ok=True, parents=True)
    try:
        plan = Plan(words.minutes * 60, words.seed, words.clients, words.outage_every, words.settled)
        findings, events = run(plan, folder)
    finally:
        if not words.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(findings, events))
    return 1 if findings.violations else 0


if __name__ == "__main__":
    sys.exit(main())
