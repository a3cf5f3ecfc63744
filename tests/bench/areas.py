"""A profile summed up by areas of the code: calls and time."""

import pstats
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

BUILT_IN = "~"
# Modules and packages by area; if several match, the first counts.
AREAS = {
    "server": "edge/server edge/protocol edge/cycle edge/deadlines edge/request_head edge/connection_limit edge/disconnect "
    "edge/workers edge/memory ops",
    "application": "edge core/asgi core/errors core/in_flight",
    "keys": "auth proxy/access",
    "limits": "limits",
    "Redis": "stores/redis_connection stores/redis_shards stores/redis_client stores/redis_keys",
    "dialect": "dialects proxy/body proxy/content_encoding core/strict_json",
    "exchange": "proxy core/cancel_scope audit/prompt_log",
    "routing": "fleet",
    "audit": "audit stores/postgres",
    "log": "telemetry/logs",
    "metrics": "telemetry",
}
PLACES = {tuple(place.split("/")): area for area, places in AREAS.items() for place in places.split()}
AREA_OF_PACKAGE = {
    "uvicorn": "server",
    "starlette": "application",
    "redis": "Redis",
    "aiohttp": "routing",
    "yarl": "routing",
    "multidict": "routing",
    "asyncpg": "audit",
    "prometheus_client": "metrics",
    "logging": "log",
}
OTHER = "the rest"

Function = tuple[str, int, str]


class Cost(NamedTuple):
    calls: int
    seconds: float


@dataclass
class Account:
    """Calls and seconds of own time, by area and by function; built-in functions count for their callers."""

    calls: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    functions: dict[Function, Cost] = field(default_factory=dict)
    own: Counter[Function] = field(default_factory=Counter)

    def add(self, function: Function, calls: int, seconds: float) -> None:
        area = area_of(function[0])
        self.calls[area] += calls
        self.seconds[area] += seconds  # type: ignore[assignment] # a counter of fractions
        known = self.functions.get(function, Cost(0, 0))
        self.functions[function] = Cost(known.calls + calls, known.seconds + seconds)

    def calls_of(self, file: str, name: str) -> int:
        """How often a function was called."""
        return sum(calls for (path, _, known), calls in self.own.items() if known == name and path.endswith(file))


def area_of(path: str) -> str:
    parts = Path(path).parts
    if "gateway" in parts[:-1]:
        inner = Path(path).with_suffix("").parts[parts.index("gateway") + 1 :]
        return next((area for place, area in PLACES.items() if inner[: len(place)] == place), OTHER)
    return next((AREA_OF_PACKAGE[part] for part in reversed(parts) if part in AREA_OF_PACKAGE), OTHER)


def read(file: Path) -> Account:
    account = Account()
    stats: dict[Function, Any] = pstats.Stats(str(file)).stats  # type: ignore[attr-defined] # typeshed leaves it out
    for function, (_, calls, seconds, _, callers) in stats.items():
        if function[0] != BUILT_IN:
            account.add(function, calls, seconds)
            account.own[function] += calls
            continue
        for caller, (_, some, of_them, _) in callers.items():
            account.add(caller, some, of_them)
    return account


def table(account: Account, events: float) -> list[list[str]]:
    """Per event (a request, a chunk): calls, microseconds of own time, share."""
    total = sum(account.seconds.values())
    rows = [["area", "calls", "own time", "share"]]
    for area, seconds in account.seconds.most_common():
        row = [area, f"{account.calls[area] / events:.1f}", f"{seconds / events * 1e6:.1f} µs", f"{seconds / total:.0%}"]
        rows.append(row)
    rows.append(["all", f"{sum(account.calls.values()) / events:.1f}", f"{total / events * 1e6:.1f} µs", "100%"])
    return rows


def dearest(account: Account, events: float, most: int) -> Iterator[list[str]]:
    """The functions that take most time, with the built-in functions they call."""
    ranked = sorted(account.functions.items(), key=lambda item: -item[1].seconds)[:most]
    yield ["function", "calls", "own time"]
    for (path, _, name), cost in ranked:
        where = f"{Path(path).stem}.{name}"
        yield [where, f"{cost.calls / events:.2f}", f"{cost.seconds / events * 1e6:.1f} µs"]
