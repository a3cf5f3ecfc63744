"""The figures of one run: from the rows of its calls, from the machines' counts, and from the gateway's audit."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from tests.bench.fleet.scenario import Scenario

ALL = "all"
SUMMED = ("loads", "evictions", "saved tokens", "prompt tokens")
Figures = dict[str, Any]
# Rows are those of `traffic.Row`, with its property `ok`.
Rows = Sequence[dict[str, Any]]


def quantile(values: Sequence[float], part: float) -> float | None:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None


def groups(rows: Rows, seconds: float) -> dict[str, Figures]:
    """By group, and of all."""
    names = dict.fromkeys(row["who"] for row in rows)
    found = {name: _of([row for row in rows if row["who"] == name], seconds) for name in names}
    return {ALL: _of(rows, seconds), **found}


def _of(rows: Rows, seconds: float) -> Figures:
    """A call that was given up waited at least until then."""
    answered = [row for row in rows if row["ok"]]
    waits = [row["ttft"] for row in rows if row["ok"] or row["status"] == "unfinished"]
    return {
        "requests": len(rows),
        "failed": sum(1 for row in rows if not row["ok"] and row["status"] != "unfinished"),
        "unfinished": sum(1 for row in rows if row["status"] == "unfinished"),
        "ttft_p50": quantile(waits, 0.5),
        "ttft_p95": quantile(waits, 0.95),
        "ttft_p99": quantile(waits, 0.99),
        "total_p95": quantile([row["total"] for row in answered], 0.95),
        "tokens_s": sum(row["tokens"] for row in answered if row["in_time"]) / seconds,
    }


def fleet(counts: Sequence[Figures], found: Scenario) -> Figures:
    """Of all machines; `over_slots` lists each model that had more calls at once than slots."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update({name: count.get(name, 0) for name in SUMMED})
    pairs = list(zip(found.boxes, counts, strict=True))
    return {
        "loads": total["loads"],
        "evictions": total["evictions"],
        "cached": total["saved tokens"] / max(1, total["prompt tokens"]),
        "output": {box.name: count.get("output tokens", 0) for box, count in pairs},
        "most_loads_at_once": max((count.get("most loads at once", 0) for count in counts), default=0),
        "over_slots": [
            f"{box.name} {model}: {calls} calls, {box.slots} slots"
            for box, count in pairs
            for model, calls in count.get("most calls at once", {}).items()
            if calls > box.slots
        ],
        "late_p99": max((count.get("late p99", 0.0) for count in counts), default=0.0),
    }


def gateway(audit: Rows, cpu_s_per_request: float) -> Figures:
    found: Figures = {"cpu_ms_per_request": 1000 * cpu_s_per_request, "audit_rows": len(audit)}
    estimates = [(row["estimated_ms"], row["ttfb_ms"]) for row in audit if row.get("estimated_ms") and row.get("ttfb_ms")]
    if estimates:
        errors = [abs(estimated - real) / real for estimated, real in estimates]
        found["eta"] = {
            "calls": len(errors),
            "median_error": statistics.median(errors),
            "p90_error": quantile(errors, 0.9),
            "median_ratio": statistics.median(estimated / real for estimated, real in estimates),
        }
    seconds = [row for row in audit if row.get("backend_ms")]
    if seconds:
        by_key: defaultdict[str, float] = defaultdict(float)
        for row in seconds:
            by_key[row["key"]] += row["backend_ms"] / 1000
        found["backend_s"] = dict(sorted(by_key.items()))
    return found


def served(rows: Rows, found: Scenario) -> dict[str, Figures]:
    """By key, in seconds of the only machine: what was served in time, and the dearest call."""
    (box,) = found.boxes
    in_time = [row for row in rows if row["ok"] and row["in_time"]]
    keys = dict.fromkeys(row["key"] for row in rows)
    seconds = [(row["key"], row["prompt"] / box.prefill + row["tokens"] / box.decode) for row in in_time]
    costs = {key: [cost for name, cost in seconds if name == key] for key in keys}
    return {key: {"calls": len(of), "seconds": sum(of), "dearest": max(of, default=0.0)} for key, of in costs.items()}
