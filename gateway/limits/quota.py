"""Limits as numbers: what an operator set for a key or for some of its models, and what applies to a request."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.dialects.model_names import AllowList

# None: the default applies. 0: nothing is allowed. UNLIMITED is the largest bigint, which no operator can enter.
UNLIMITED = 2**63 - 1
NAMES = ("rpm", "tpm", "concurrent", "day", "month", "day_seconds", "month_seconds")


@dataclass(frozen=True)
class Quota:
    """Requests and tokens per minute, requests at once, tokens and seconds of backends per day and per calendar month (UTC)."""

    rpm: int | None = None
    tpm: int | None = None
    concurrent: int | None = None
    day: int | None = None
    month: int | None = None
    day_seconds: int | None = None
    month_seconds: int | None = None

    def packed(self) -> dict[str, int | None]:
        return {name: getattr(self, name) for name in NAMES}


@dataclass(frozen=True)
class Rule:
    """A quota shared by the models that match a glob, in addition to the key's own."""

    pattern: str
    quota: Quota

    def packed(self) -> dict[str, Any]:
        return {"pattern": self.pattern, **self.quota.packed()}

    def matches(self, model: str) -> bool:
        return AllowList((self.pattern,)).allows(model, cloud=False)


class CounterSet(NamedTuple):
    """A set of counters and its limits, -1 for no limit; `name` is part of the counters' names in Redis."""

    name: str
    rpm: int
    tpm: int
    concurrent: int
    day: int
    month: int
    day_seconds: int = -1
    month_seconds: int = -1

    @property
    def has_budget(self) -> bool:
        return self.day >= 0 or self.month >= 0

    @property
    def limits_seconds(self) -> bool:
        return self.day_seconds >= 0 or self.month_seconds >= 0

    @property
    def of_tokens(self) -> tuple[int, int, int]:
        return self.tpm, self.day, self.month

    @property
    def is_of_rule(self) -> bool:
        return "|" in self.name


def unpack(packed: Mapping[str, Any]) -> Quota:
    """Processes of an earlier version, which know fewer limits, may have packed it."""
    return Quota(**{name: packed.get(name) for name in NAMES})


def unpack_rules(packed: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    return tuple(Rule(rule["pattern"], unpack(rule)) for rule in packed)


def counter_set(name: str, quota: Quota, defaults: Quota) -> CounterSet:
    own = [getattr(quota, field) for field in NAMES]
    standard = [getattr(defaults, field) for field in NAMES]
    limits = [second if first is None else first for first, second in zip(own, standard, strict=True)]
    return CounterSet(name, *(-1 if limit is None or limit == UNLIMITED else limit for limit in limits))
