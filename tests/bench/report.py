"""The table, the JSON and the plot of a run."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.bench import growth
from tests.bench.scenarios import ONE, RATE, STREAMS, THOUSAND, WHOLE, Results, Scenario

GATEWAY, PLAIN, NGINX, DIRECT = "gateway", "Starlette + aiohttp", "nginx", "direct"
COLUMNS: tuple[tuple[str, Scenario, tuple[str, ...], float], ...] = (
    ("requests/s, 32 conn.", WHOLE, ("rps",), 1),
    ("CPU/request, µs", WHOLE, ("cpu_us_req",), 1),
    ("p50 at 1 conn., ms", ONE, ("lat", "p50"), 1000),
    ("p99 at 100/s, ms", RATE, ("lat", "p99"), 1000),
    ("CPU/chunk, µs", STREAMS, ("cpu_us_chunk",), 1),
    ("first byte added, p50 ms", STREAMS, ("ovh_ttfb", "p50"), 1000),
    ("pause added of 1,000 streams, p99 ms", THOUSAND, ("lag", "p99"), 1000),
)


def table(results: Results) -> str:
    rows = [["", *(name for name, *_ in COLUMNS)]]
    for subject in results.runs:
        values = [results.median(subject, scenario, *path) for _, scenario, path, _ in COLUMNS]
        rows.append([subject, *(shown(value, unit) for value, (*_, unit) in zip(values, COLUMNS, strict=True))])
    return aligned(rows)


def shown(value: float | None, unit: float) -> str:
    if value is None:
        return "-"
    number = value / unit
    return f"{number:,.0f}" if number >= 100 else f"{number:.2f}"


def aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:], strict=True)) for row in rows
    )


def goals(results: Results) -> list[tuple[str, str, str, bool | None]]:
    """Each goal, the result, and whether it is met; None if there was nothing to compare with."""
    return list(_goals(results))


def _goals(results: Results) -> Iterator[tuple[str, str, str, bool | None]]:
    def ratio(other: str, scenario: Scenario, *path: str) -> float | None:
        ours, theirs = results.median(GATEWAY, scenario, *path), results.median(other, scenario, *path)
        return None if ours is None or not theirs else ours / theirs

    def row(name: str, goal: str, found: float | None, is_met: Callable[[float], bool]) -> tuple[str, str, str, bool | None]:
        return name, goal, "-" if found is None else f"{found:.2f}", None if found is None else is_met(found)

    yield row("requests/s against Starlette + aiohttp", "≥ 2.0×", ratio(PLAIN, WHOLE, "rps"), lambda x: x >= 2)
    yield row("requests/s against nginx", "≥ 0.083×", ratio(NGINX, WHOLE, "rps"), lambda x: x >= 1 / 12)
    yield row("p50 at 1 connection against Starlette + aiohttp", "≤ 1.0×", ratio(PLAIN, ONE, "lat", "p50"), lambda x: x <= 1)
    yield row("p99 added at 100/s against nginx", "≤ 3×", _added(results), lambda x: x <= 3)
    yield row("CPU per chunk against nginx", "≤ 2×", ratio(NGINX, STREAMS, "cpu_us_chunk"), lambda x: x <= 2)
    pause, first = results.median(GATEWAY, THOUSAND, "lag", "p99"), results.median(GATEWAY, STREAMS, "ovh_ttfb", "p50")
    yield row("pause added, 1,000 streams, p99 ms", "≤ 10", pause and pause / 1000, lambda x: x <= 10)
    yield row("first byte added, p50 ms", "≤ 0.6", first and first / 1000, lambda x: x <= 0.6)
    own = results.own
    idle, after = own.get("memory idle, MiB"), own.get("memory after 1,500 bodies of 150 KB, MiB")
    yield row("memory idle, MiB", "≤ 60", idle, lambda x: x <= 60)
    yield row("memory of an open stream, KiB", "≤ 30", own.get("memory of an open stream, KiB"), lambda x: x <= 30)
    yield row("memory after large bodies against idle", "≤ 1.2×", after and idle and after / idle, lambda x: x <= 1.2)
    quiet, loud = own.get("good p99 alone, ms"), own.get("good p99 beside the flood, ms")
    yield row("good p99 beside 2,000 wrong keys/s", "≤ 2×", quiet and loud and loud / quiet, lambda x: x <= 2)
    few, many = (own.get(growth.name_of(size)) for size in (growth.FEW, growth.MANY))
    yield row("CPU of a request, 1,000 times the keys", "≤ 1.1×", few and many and many / few, lambda x: x <= 1.1)
    pause_s = own.get("chunk's longest pause beside large bodies, ms")
    yield row("longest pause of a chunk beside 200 KB bodies, ms", "≤ 20", pause_s, lambda x: x <= 20)


def _added(results: Results) -> float | None:
    """The latency added to a direct request, compared with nginx."""
    ours, theirs, none = (results.median(who, RATE, "lat", "p99") for who in (GATEWAY, NGINX, DIRECT))
    if ours is None or theirs is None or none is None or theirs <= none:
        return None
    return (ours - none) / (theirs - none)


def goals_table(results: Results) -> str:
    words = {True: "met", False: "NOT met", None: "-"}
    return aligned([["goal", "is to be", "is", ""], *([*row[:3], words[row[3]]] for row in goals(results))])


def as_json(results: Results) -> str:
    machine = {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    content: dict[str, Any] = {
        "machine": machine,
        "dropped_rounds": results.dropped,
        "alone": results.own,
        "runs": results.runs,
    }
    return json.dumps(content, indent=1) + "\n"


def svg(results: Results) -> str:
    """Requests per second as bars."""
    values = {subject: results.median(subject, WHOLE, "rps") or 0.0 for subject in results.runs if subject != DIRECT}
    most, lines = max(values.values(), default=1.0), []
    for n, (subject, value) in enumerate(sorted(values.items(), key=lambda item: -item[1])):
        y, length = 50 + n * 32, 420 * value / most
        colour = "#1f6feb" if subject == GATEWAY else "#8b949e"
        lines.append(f'<text x="170" y="{y + 15}" text-anchor="end">{subject}</text>')
        lines.append(f'<rect x="180" y="{y}" width="{length:.1f}" height="20" fill="{colour}"/>')
        lines.append(f'<text x="{186 + length:.1f}" y="{y + 15}">{value:,.0f}</text>')
    height = 70 + len(values) * 32
    title = '<text x="10" y="25" font-weight="bold">Whole answers, 32 connections, one core: requests per second</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="700" height="{height}" font-family="sans-serif" font-size="13">'
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', title, *lines, "</svg>"]) + "\n"


def write(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(as_json(results), encoding="utf-8")
    (folder / "results.svg").write_text(svg(results), encoding="utf-8")
