"""Which models a backend has loaded: as it lists them, and as Redis or one process keeps them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

from gateway.dialects.model_entries import whole_number
from gateway.dialects.model_names import canonical
from gateway.fleet.llama_server import RoutedModel

MOST_RESIDENTS = 64
# In ms since 1970; what has no end of its own.
NEVER_MS = 253_402_300_799_000
# Ollama's "forever" is 292 years, and its zero time is in the year 1.
LONGEST_S = 100 * 365 * 86_400.0
# Before this version, Ollama lists a model while it loads it; since then /api/ps waits for the load.
WAITS_FOR_LOADS = (0, 32, 10)
RESIDENT = re.compile(r"(\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16}) (\d{1,16})", re.ASCII)
LOADING = re.compile(r"(.{1,350})[\x1f ].+[\x1f ](\d{1,16})(?:\.\d*)?[\x1f ](\d{1,16})(?:\.\d*)?", re.ASCII)


class Listed(NamedTuple):
    """A model in a backend's answer: bytes in all and in VRAM, tokens of context, seconds until it goes (None: never)."""

    model: str
    size: int
    size_vram: int
    context: int
    left_s: float | None


@dataclass(frozen=True)
class Resident:
    """A loaded model; times in seconds since 1970: of its load, of its last use, and when it goes (None: never).

    `size_vram` is all of its size on a backend that has never had a model in VRAM.
    """

    model: str
    size: int = 0
    size_vram: int = 0
    context: int = 0
    since: float = 0.0
    used: float = 0.0
    until: float | None = None


@dataclass(frozen=True)
class Loading:
    """A load that a call of ours caused."""

    model: str
    began: float
    until: float


@dataclass(frozen=True)
class BackendLoad:
    """What a backend has loaded, as known `at` a time.

    `seen` is the most bytes of VRAM that it was seen to use, `misfit` the least that did not fit, 0 if unknown. `loads` and
    `evictions` are how many of them were seen.
    """

    backend: str
    swaps: bool
    residents: tuple[Resident, ...] = ()
    seen: int = 0
    misfit: int = 0
    at: float = 0.0
    error: str = ""
    loading: Loading | None = None
    loads: int = 0
    evictions: int = 0

    @property
    def used(self) -> int:
        """Bytes of VRAM."""
        return sum(resident.size_vram for resident in self.residents)


def of_ollama(entries: Iterable[Mapping[str, Any]], now: float) -> list[Listed]:
    """The models of an answer to /api/ps; `now` by the clock of that backend."""
    found = {}
    for entry in entries:
        name = canonical(entry["name"]).canonical
        size, size_vram, context = (whole_number(entry.get(field)) for field in ("size", "size_vram", "context_length"))
        found[name] = Listed(name, size, size_vram, context, _left_s(entry.get("expires_at"), now))
        if len(found) == MOST_RESIDENTS:
            break
    return list(found.values())


def _left_s(expires_at: object, now: float) -> float | None:
    try:
        left = datetime.fromisoformat(str(expires_at)).timestamp() - now
    except (ValueError, OverflowError):
        return None
    return max(0.0, left) if abs(left) < LONGEST_S else None


def of_router(models: Mapping[str, RoutedModel]) -> list[Listed]:
    """It does not report VRAM: the file's size is the best estimate."""
    loaded = [Listed(name, one.size, one.size, one.context, None) for name, one in models.items() if one.is_loaded]
    return loaded[:MOST_RESIDENTS]


def lists_loading(version: str) -> bool:
    """Whether an Ollama of this version lists a model while it loads it; so does one of an unknown version."""
    numbers = re.match(r"v?(\d{1,6})\.(\d{1,6})\.(\d{1,6})", version, re.ASCII)
    return numbers is None or tuple(map(int, numbers.groups())) < WAITS_FOR_LOADS


def arguments(listed: Sequence[Listed]) -> list[Any]:
    """As the script `residents` takes them."""
    values: list[Any] = []
    for one in listed:
        left_ms = -1 if one.left_s is None else round(one.left_s * 1000)
        values += (one.model, one.size_vram, one.size, one.context, left_ms)
    return values


def unpack(backend: str, fields: Mapping[bytes, bytes]) -> BackendLoad:
    """What Redis has of a backend; anybody may have written it, so what is no value is left out."""
    texts = {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
    numbers = {name: int(text) for name, text in texts.items() if text.isdecimal() and text.isascii() and len(text) < 17}
    sizes = {name.removeprefix("s:"): number for name, number in numbers.items() if name.startswith("s:")}
    residents = [found for name, text in texts.items() if (found := _resident(name, text, sizes))]
    loading = LOADING.fullmatch(texts.get("loading", ""))
    return BackendLoad(
        backend,
        swaps=True,
        residents=tuple(sorted(residents, key=lambda resident: resident.model)[:MOST_RESIDENTS]),
        seen=numbers.get("seen", 0),
        misfit=numbers.get("room", 0),
        at=numbers.get("at", 0) / 1000,
        error=texts.get("error", ""),
        loading=Loading(loading[1], int(loading[2]) / 1000, int(loading[3]) / 1000) if loading else None,
        loads=numbers.get("loads", 0),
        evictions=numbers.get("evictions", 0),
    )


def _resident(name: str, text: str, sizes: Mapping[str, int]) -> Resident | None:
    found = RESIDENT.fullmatch(text)
    if not name.startswith("r:") or found is None:
        return None
    model = name.removeprefix("r:")
    vram, since, used, until, context = map(int, found.groups())
    ends = None if until >= NEVER_MS or not until else until / 1000
    return Resident(model, sizes.get(model, vram), vram, context, since / 1000, used / 1000, ends)


def merged(before: BackendLoad, listed: Sequence[Listed], sent: float, now: float) -> BackendLoad:
    """What one process knows after an answer, while Redis is away; as the script `residents` does it for all."""
    known = {resident.model: resident for resident in before.residents}
    has_gpu = any(one.size_vram for one in listed)
    names = {one.model for one in listed}
    kept = [resident for resident in before.residents if resident.model not in names and resident.since > sent]
    fresh = [
        Resident(
            one.model,
            one.size,
            one.size_vram if has_gpu else one.size,
            one.context,
            known[one.model].since if one.model in known else now,
            known[one.model].used if one.model in known else now,
            None if one.left_s is None else now + one.left_s,
        )
        for one in listed
    ]
    after = replace(before, residents=(*fresh, *kept), at=sent, error="", loading=None)
    return replace(after, seen=max(before.seen, after.used))
