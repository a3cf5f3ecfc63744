"""`python -m tests.bench.fleet.chaos --minutes 10`: kills at random what serves calls, and checks that the promises hold.

Two gateways with two processes each share a PostgreSQL, a Redis and three simulated machines. Ends with 1 if a promise was
broken.
"""

import argparse
import asyncio
import random
import shutil
import sys
import time
from pathlib import Path

from tests.bench.fleet.chaos import checks
from tests.bench.fleet.chaos.checks import Excused, Findings
from tests.bench.fleet.chaos.clients import Clients
from tests.bench.fleet.chaos.fleet import Fleet, fleet
from tests.bench.fleet.chaos.kills import Event, Kills
from tests.support import memory_folder


async def disturb(found: Fleet, clients: Clients, kills: Kills, at_once: int) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(clients.run(at_once))
            group.create_task(kills.run())
    finally:
        for gateway in found.gateways:
            gateway.wake()


def judge(found: Fleet, clients: Clients, kills: Kills, settled_s: float) -> Findings:
    lates = [Event("redis", "late", *span) for gateway in found.gateways for span in gateway.outages()]
    findings, excused = Findings(), Excused([*kills.events, *lates], settled_s)
    findings.figures["excused, s"] = round(excused.total_s(), 1)
    checks.of_calls(clients.calls, findings)
    checks.of_end(found, findings)
    checks.of_boxes(found.boxes, excused, findings)
    checks.of_keys(found.boxes, clients.calls, excused, findings)
    checks.of_rows(found.rows(), clients.calls, found.boxes, excused, findings)
    return findings


def table(findings: Findings, kills: Kills) -> str:
    events = [f"{event.began:.2f}–{event.ended:.2f} {event.kind}: {event.what}" for event in kills.events]
    width = max(map(len, findings.figures))
    lines = [f"{name:{width}}  {value}" for name, value in findings.figures.items()]
    return "\n".join([*events, "", *lines, "", *(f"VIOLATION {text}" for text in findings.violations)])


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
        with fleet(folder) as found:
            chance, until = random.Random(words.seed), time.time() + words.minutes * 60
            urls = lambda: [gateway.url for gateway in found.gateways]  # noqa: E731
            clients = Clients(urls, found.keys, random.Random(words.seed), until)
            kills = Kills(found, chance, until, outage_every_s=words.outage_every)
            asyncio.run(disturb(found, clients, kills, words.clients))
            findings = judge(found, clients, kills, words.settled)
    finally:
        if not words.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(table(findings, kills))
    return 1 if findings.violations else 0


if __name__ == "__main__":
    sys.exit(main())
