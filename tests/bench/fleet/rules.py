"""How others choose a backend. Pure: no I/O, no clock."""

import bisect
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

REPLICAS, BOUND, LETTERS = 256, 1.25, 100


@dataclass
class Upstream:
    """A backend as a router knows it."""

    url: str
    models: set[str] = field(default_factory=set)
    loaded: set[str] = field(default_factory=set)
    in_flight: int = 0


@dataclass(frozen=True)
class Request:
    """`opening` is the first message of the user."""

    model: str
    opening: str


Rule = Callable[[Sequence[Upstream], Request], Upstream]


def first(able: Sequence[Upstream], request: Request) -> Upstream:
    """Strict order."""
    return able[0]


def at_random(able: Sequence[Upstream], request: Request) -> Upstream:
    """Open WebUI."""
    return random.choice(able)


def least(able: Sequence[Upstream], request: Request) -> Upstream:
    """The fewest calls in flight that this router sent: least_conn of nginx."""
    return min(able, key=lambda upstream: upstream.in_flight)


def warm(able: Sequence[Upstream], request: Request) -> Upstream:
    """The fewest in flight of those that have the model loaded, else of all: ollamaMQ."""
    loaded = [upstream for upstream in able if request.model in upstream.loaded]
    return least(loaded or able, request)


def round_robin() -> Rule:
    numbers = count()
    return lambda able, request: able[next(numbers) % len(able)]


def bounded_hash(urls: Sequence[str]) -> Rule:
    """Consistent hashing of the first user message, with bounded loads: KubeAI."""
    ring = sorted((_hash(f"{url}{number}"), url) for url in urls for number in range(REPLICAS))

    def choose(able: Sequence[Upstream], request: Request) -> Upstream:
        by_url = {upstream.url: upstream for upstream in able}
        total = sum(upstream.in_flight for upstream in able)
        most = BOUND * (total + 1) / len(able)
        start = bisect.bisect(ring, (_hash(request.model + request.opening[:LETTERS]), ""))
        walk = [by_url[url] for _, url in ring[start:] + ring[:start] if url in by_url]
        return next((upstream for upstream in walk if not total or upstream.in_flight + 1 <= most), walk[0])

    return choose


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# Each rule with a memory of its own, for a router in front of these addresses.
RULES: dict[str, Callable[[Sequence[str]], Rule]] = {
    "random": lambda urls: at_random,
    "rr": lambda urls: round_robin(),
    "least": lambda urls: least,
    "warm": lambda urls: warm,
    "chwbl": bounded_hash,
    "first": lambda urls: first,
}
