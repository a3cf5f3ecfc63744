"""One run: clients and kills at the same time, and what is checked then."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.fleet.queue import LATE_S
from tests.bench.fleet.chaos import checks
from tests.bench.fleet.chaos.checks import Excused, Findings
from tests.bench.fleet.chaos.clients import Clients
from tests.bench.fleet.chaos.fleet import Fleet, fleet
from tests.bench.fleet.chaos.kills import Act, Event, Kills


@dataclass(frozen=True)
class Plan:
    """`settled_s` is how long after an outage of Redis all must be exact again; with `acts` only these happen, in this order.

    `of_killed`: it waits for the leases of killed processes to end, and checks that the audit has their calls.
    """

    seconds: float
    seed: int = 1
    at_once: int = 24
    outage_every_s: float = 120.0
    settled_s: float = 60.0
    pause_s: tuple[float, float] = (1.0, 8.0)
    longest_stop_s: float = 12.0
    acts: Sequence[Act] = ()
    of_killed: bool = True
    # So much faster than real ones are the machines.
    speed: float = 6.0


def run(plan: Plan, folder: Path) -> tuple[Findings, list[Event]]:
    with fleet(folder, plan.speed) as found:
        chance, until = random.Random(plan.seed), time.time() + plan.seconds
        clients = Clients(found.urls, found.keys, random.Random(plan.seed), until)
        kills = Kills(found, chance, until, plan.pause_s, plan.outage_every_s, plan.longest_stop_s, plan.acts)
        asyncio.run(_disturb(found, clients, kills, plan.at_once))
        return _judge(plan, found, clients, kills), kills.events


async def _disturb(found: Fleet, clients: Clients, kills: Kills, at_once: int) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(clients.run(at_once))
            group.create_task(kills.run())
    finally:
        for gateway in found.gateways:
            gateway.wake()


def _judge(plan: Plan, found: Fleet, clients: Clients, kills: Kills) -> Findings:
    outages = (span for gateway in found.gateways for span in gateway.outages())
    lates = [Event("redis", "late", began, ended) for began, ended in outages if ended - began > LATE_S]
    findings, excused = Findings(), Excused([*kills.events, *lates], plan.settled_s)
    checks.of_calls(clients.calls, findings)
    checks.of_end(found, findings, of_killed=plan.of_killed)
    checks.of_boxes(found.boxes, excused, findings)
    checks.of_keys(found.boxes, clients.calls, excused, findings)
    checks.of_rows(found, clients.calls, excused, findings, of_killed=plan.of_killed)
    findings.figures["seconds in which less is promised"] = excused.total_s()
    return findings
