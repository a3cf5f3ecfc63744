"""What must hold whatever was killed, and what did not."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tests.bench.fleet.chaos.clients import Call
from tests.bench.fleet.chaos.fleet import KEYS, LOADED_EVERY_S, Box, Fleet
from tests.bench.fleet.chaos.kills import LEASE_S, Event

# Leases of calls end after 25 s, and are settled after four more; of processes after 8 s.
ROWS_WITHIN_S, EMPTY_WITHIN_S = 60.0, 20.0
# From when on a request is in Redis, and its row cannot get lost.
ADMITTED_WITHIN_S = 1.0
# The client of a call that has ended may be sooner with its next than a machine notices the end.
NOTICED_WITHIN_S = 0.3
# What a machine had loaded when it was killed is known not to be there any more after two questions.
ASKED_AGAIN_S = 2 * LOADED_EVERY_S + 2
# A process that was stopped for longer than its lease still has calls at machines, whose slots others got.
RESUMED_S = 10.0


@dataclass
class Findings:
    """`figures` are for the table; what is in `violations` must not be."""

    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


@dataclass
class Excused:
    """Times in which the guarantees are weaker, as they are stated in docs/fleet.md."""

    events: list[Event]
    settled_s: float

    def without_redis(self, at: float) -> bool:
        return any(one.kind == "redis" and one.began <= at <= one.ended + self.settled_s for one in self.events)

    def total_s(self) -> float:
        """How long calls at machines may be more than their slots."""
        seconds = {second for one in self.events for second in range(int(one.began), int(one.ended + self.settled_s) + 1)}
        return sum(self.of_slots(second + 0.5) for second in seconds)

    def of_slots(self, at: float) -> bool:
        stops = (one for one in self.events if one.kind == "worker stopped")
        return self.without_redis(at) or any(one.began + LEASE_S - 1 <= at <= one.ended + RESUMED_S for one in stops)

    def of_loads(self, at: float, box: str) -> bool:
        kills = (one for one in self.events if one.kind == "box" and one.what == box)
        return self.of_slots(at) or any(one.began <= at <= one.ended + ASKED_AGAIN_S for one in kills)

    def of_rows(self, call: Call) -> bool:
        """Who is admitted without Redis is known to its own process only."""
        outages = (one for one in self.events if one.kind == "redis")
        return any(one.began - 1 <= call.ended and call.sent <= one.ended + 5 for one in outages)


def of_boxes(boxes: Iterable[Box], excused: Excused, findings: Findings) -> None:
    counts: Counter[str] = Counter()
    for box in boxes:
        for line in box.lines():
            kind, at = line["kind"], line["at"]
            counts[kind] += 1
            if kind not in ("calls", "loads"):
                continue
            is_excused = excused.of_slots(at) if kind == "calls" else excused.of_loads(at, box.config.name)
            counts[f"{kind} inside"] += is_excused
            if not is_excused:
                most = box.config.slots if kind == "calls" else 1
                findings.violations.append(
                    f"{at:.2f} {box.config.name}: {line['many']} {kind} at once of {line['model']}, not {most}"
                )
    findings.figures |= {
        "calls at machines": counts["begins"],
        "too many calls, inside the stated times": counts["calls inside"],
        "two loads, inside the stated times": counts["loads inside"],
        "for less than 0.1 s": counts["brief calls"] + counts["brief loads"],
    }


def most_at_once(spans: list[tuple[float, float]]) -> tuple[int, float]:
    """How many of these overlap at most, and when."""
    moments = sorted(
        [(began, 1) for began, _ in spans] + [(max(began, ended - NOTICED_WITHIN_S), -1) for began, ended in spans]
    )
    many = most = 0
    at = 0.0
    for moment, change in moments:
        many += change
        if many > most:
            most, at = many, moment
    return most, at


def of_keys(boxes: Iterable[Box], calls: list[Call], excused: Excused, findings: Findings) -> None:
    key_of = {call.id: call.key for call in calls}
    spans: dict[str, list[tuple[float, float]]] = {name: [] for name in KEYS}
    for box in boxes:
        begun: dict[str, float] = {}
        ends = [{"at": at, "kind": "killed"} for at in box.killed_at]
        for line in sorted([*box.lines(), *ends], key=lambda line: line["at"]):
            if line["kind"] == "begins":
                begun[line["id"]] = line["at"]
            elif line["kind"] in ("ends", "killed"):
                for call in [line["id"]] if line["kind"] == "ends" else list(begun):
                    began = begun.pop(call, 0.0)
                    if call in key_of and not excused.of_slots(began):
                        spans[key_of[call]].append((began, line["at"]))
    for name, key in KEYS.items():
        most, (many, at) = key.quota.concurrent, most_at_once(spans[name])
        findings.figures[f"most calls at once of '{name}'"] = f"{many} of {most or 'any'}"
        if most and many > most:
            findings.violations.append(f"{at:.2f} the key {name} had {many} calls at once, not {most}")


def of_calls(calls: list[Call], findings: Findings) -> None:
    counts = Counter(call.outcome for call in calls)
    findings.figures |= {"calls": len(calls), **{f"  {outcome}": many for outcome, many in sorted(counts.items())}}
    findings.figures |= {
        "calls that waited": sum(call.waited_s > 0 for call in calls),
        "longest wait, s": max((call.waited_s for call in calls), default=0.0),
        "longest call, s": round(max((call.ended - call.sent for call in calls), default=0), 1),
    }
    findings.violations += [f"{call.sent:.2f} {call.id} hung" for call in calls if call.outcome == "hung"]


def of_rows(fleet: Fleet, calls: list[Call], excused: Excused, findings: Findings, *, of_killed: bool) -> None:
    """`of_killed`: also of calls whose process was killed, which have their rows when their leases have ended."""
    rows, boxes = fleet.rows(), fleet.boxes
    by_id = Counter(row["request_id"] for row in rows)
    sent = {call.id: call for call in calls}
    reached = {line["id"] for box in boxes for line in box.lines() if line["kind"] == "begins"}
    lost = 0
    for call in calls:
        began_in_time = call.ended - call.sent >= ADMITTED_WITHIN_S and call.outcome in ("reset", "cut", "left")
        if by_id[call.id] or not (call.has_row or (of_killed and (call.id in reached or began_in_time))):
            continue
        if excused.of_rows(call) and not call.has_row:
            lost += 1
        else:
            findings.violations.append(
                f"{call.sent:.2f} {call.id} ({call.outcome} after {call.ended - call.sent:.1f} s) has no row"
            )
    findings.violations += [f"{many} rows of {name}" for name, many in by_id.items() if many > 1]
    findings.violations += [f"a row of {name}, which nobody sent" for name in by_id if name not in sent]
    outcomes = Counter(row["outcome"] for row in rows)
    findings.figures |= {
        "rows": len(rows),
        "  abandoned": outcomes["abandoned"],
        "  without a row, killed while Redis was away": lost,
    }


def of_end(fleet: Fleet, findings: Findings, *, of_killed: bool) -> None:
    """Everything is free again, at the latest when the leases of what was killed have ended."""
    ends: list[tuple[str, Callable[[], Any], float]] = [
        ("machines", fleet.in_flight, EMPTY_WITHIN_S),
        ("board", fleet.board, EMPTY_WITHIN_S),
        ("rows in Redis", fleet.rows_in_redis, EMPTY_WITHIN_S),
    ]
    if of_killed:
        ends.append(("keys", fleet.keys_and_rows, ROWS_WITHIN_S))
    for name, found, seconds in ends:
        began = time.time()
        if left := _empty(found, seconds):
            findings.violations.append(f"at the end the {name} still have: {left}")
        findings.figures[f"{name}: empty after, s"] = round(time.time() - began, 1)


def _empty(found: Callable[[], Any], seconds: float) -> Any:
    until = time.time() + seconds
    while (left := found()) and time.time() < until:
        time.sleep(0.2)
    return left
