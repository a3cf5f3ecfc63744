"""The measurements: rounds in turn, without disturbed ones; results are medians."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench import growth, stores
from tests.bench.subjects import MODEL, Subject
from tests.bench.tools import Tools, is_disturbed, load, memory_mib

Progress = Callable[[str], None]
KEPT_AT_LEAST = 1


@dataclass(frozen=True)
class Scenario:
    """The options of the load generator; slow subjects run only the light scenarios."""

    name: str
    options: tuple[str, ...]
    for_slow_ones: bool = False


WHOLE = Scenario("whole answers, 32 connections", ("-c", "32", "-t", "3", "-w", "1"), for_slow_ones=True)
ONE = Scenario("whole answers, 1 connection", ("-c", "1", "-t", "2", "-w", "0.5"), for_slow_ones=True)
RATE = Scenario("100 requests/s", ("-c", "16", "-R", "100", "-t", "3", "-w", "0.5"))
STREAMS = Scenario("200 streams of 50 chunks/s", ("-s", "-n", "100", "-D", "20", "-c", "200", "-t", "3", "-w", "2"))
THOUSAND = Scenario("1,000 streams of 20 chunks/s", ("-s", "-n", "60", "-D", "50", "-c", "1000", "-t", "4", "-w", "3"))
SCENARIOS = (WHOLE, ONE, RATE, STREAMS, THOUSAND)
SLOW = frozenset({"Starlette + httpx", "LiteLLM"})


@dataclass
class Results:
    """`runs[subject][scenario]` has the results of each round; `dropped` rounds were disturbed by other processes."""

    runs: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)
    dropped: int = 0
    own: dict[str, float] = field(default_factory=dict)

    def add(self, subject: str, scenario: str, found: dict[str, Any]) -> None:
        self.runs.setdefault(subject, {}).setdefault(scenario, []).append(found)

    def median(self, subject: str, scenario: Scenario, *path: str) -> float | None:
        values = [_at(found, path) for found in self.runs.get(subject, {}).get(scenario.name, [])]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


def _at(found: dict[str, Any], path: Sequence[str]) -> float | None:
    value: Any = found
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return float(value) if isinstance(value, int | float) else None


def compare(tools: Tools, subjects: Sequence[Subject], direct: Subject, rounds: int, progress: Progress) -> Results:
    results = Results()
    for number in range(rounds):
        for scenario in SCENARIOS:
            for subject in (*subjects, direct):
                if subject.name in SLOW and (number or not scenario.for_slow_ones):
                    continue
                if subject is direct and number and scenario is not RATE:
                    continue
                progress(f"round {number + 1} of {rounds}: {scenario.name}, {subject.name}")
                found = load(tools, subject.port, subject.key, subject.pids, *scenario.options)
                if is_disturbed(found):
                    results.dropped += 1
                else:
                    results.add(subject.name, scenario.name, found)
    return results


def measure_gateway(tools: Tools, gateway: Subject, direct: Subject, folder: Path, progress: Progress) -> dict[str, float]:
    """Measurements of the gateway only: memory, and good traffic beside bad."""
    return dict(_measures(tools, gateway, direct, folder, progress))


def _measures(tools: Tools, gateway: Subject, direct: Subject, folder: Path, progress: Progress) -> Iterator[tuple[str, float]]:
    def run(*options: str, key: str = gateway.key) -> dict[str, Any]:
        return load(tools, gateway.port, key, gateway.pids, *options)

    progress("memory: idle, after large bodies, with 1,000 streams open")
    yield "memory idle, MiB", memory_mib(gateway.pids)
    large = folder / "large.json"
    large.write_text(_body(150_000))
    run("-F", str(large), "-c", "16", "-R", "300", "-t", "5", "-w", "0")
    time.sleep(2)
    yield "memory after 1,500 bodies of 150 KB, MiB", memory_mib(gateway.pids)
    before = memory_mib(gateway.pids)
    with ThreadPoolExecutor(1) as beside:
        streams = beside.submit(run, "-s", "-n", "100", "-D", "50", "-c", "1000", "-t", "4", "-w", "2")
        time.sleep(4)
        yield "memory of an open stream, KiB", (memory_mib(gateway.pids) - before) * 1024 / 1000
        streams.result()

    progress("good traffic beside 2,000 wrong keys a second")
    good = ("-c", "16", "-R", "100", "-t", "4", "-w", "1")
    yield "good p99 alone, ms", run(*good)["lat"]["p99"] / 1000
    with ThreadPoolExecutor(1) as beside:
        flood = beside.submit(run, "-c", "64", "-R", "2000", "-t", "6", "-w", "0", key="nz_wrong")
        time.sleep(0.5)
        yield "good p99 beside the flood, ms", run(*good)["lat"]["p99"] / 1000
        flood.result()

    progress("chunks of 200 streams beside bodies of 200 KB")
    bigger = folder / "bigger.json"
    bigger.write_text(_body(200_000))
    with ThreadPoolExecutor(1) as beside:
        bodies = beside.submit(run, "-F", str(bigger), "-c", "4", "-R", "5", "-t", "7", "-w", "0")
        lag = run("-s", "-n", "100", "-D", "50", "-c", "200", "-t", "4", "-w", "2")["lag"]
        yield "chunk's longest pause beside large bodies, ms", lag["max"] / 1000
        bodies.result()

    progress("what requests cost the stores")
    redis_s, postgres_s = stores.redis_cpu_s(gateway), stores.postgres_cpu_s(folder)
    done = run("-c", "32", "-t", "4", "-w", "0")["ok"]
    yield "CPU of Redis for a request, µs", (stores.redis_cpu_s(gateway) - redis_s) / done * 1e6
    # The last rows are still on their way.
    time.sleep(2)
    yield "CPU of PostgreSQL for a request, µs", (stores.postgres_cpu_s(folder) - postgres_s) / done * 1e6

    yield "audit rows that one gateway moves in a second", stores.drained_rows_s(gateway)
    yield "audit row in PostgreSQL, bytes", stores.bytes_of_a_row(gateway)

    progress("growth: 10,000 keys, 1,000 models, 50 backends against 10, 5 and 2; making the keys takes a while")
    yield from growth.measure(tools, direct.port, folder).items()


def _body(size: int) -> str:
    message = {"role": "user", "content": "words " * (size // 6)}
    return json.dumps({"model": MODEL, "messages": [message], "max_tokens": 5})
