"""A key as requests use it: who it belongs to, its rights and limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from gateway.core import strict_json
from gateway.dialects.model_names import AllowList
from gateway.limits import quota
from gateway.limits.quota import CounterSet, Quota, Rule

# The role that opens the admin API.
ADMIN = "admin"
ADMIN_MODELS, SHOW_BACKEND, SHOW_OVERHEAD = "admin_models", "show_backend", "show_overhead"
# Lines of a system prompt that differ in each request are passed on.
KEEP_VOLATILE_LINES = "keep_volatile_lines"
# Calls of the key yield to those of other keys while they wait for a backend.
BATCH = "batch"
# A header of its requests names the user of each, between whom the key's share is divided.
SUB_USERS = "sub_users"
FLAGS = (ADMIN_MODELS, SHOW_BACKEND, SHOW_OVERHEAD, KEEP_VOLATILE_LINES, BATCH, SUB_USERS)
# What a key as a whole has besides its limits, and what applies if it is not set.
OPTIONS: Mapping[str, float | None] = {"weight": 1.0, "heartbeat_after_s": None}
# A key of a drill: its requests are no traffic of the installation, and it may be deleted afterwards.
DRILL = "drill"
MOST_CACHED_COUNTER_SETS = 1000


@dataclass(frozen=True)
class Key:
    """A caller's identity, rights and limits; `expires_at` is in seconds since the epoch.

    While calls wait for backends, its share of them is in proportion to `weight`; streams that wait for `heartbeat_after_s`
    get a heartbeat, None for never.
    """

    id: str
    name: str
    models: AllowList = field(default_factory=AllowList)
    quota: Quota = field(default_factory=Quota)
    rules: tuple[Rule, ...] = ()
    flags: frozenset[str] = frozenset()
    prompt_log: bool = False
    expires_at: float | None = None
    weight: float = 1.0
    heartbeat_after_s: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_counter_sets", {})

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def counter_sets(self, model: str, defaults: Quota) -> tuple[CounterSet, ...]:
        """The counters of a request: the key's own, and those of each rule that matches the model."""
        cache = self._counter_sets  # type: ignore[attr-defined]
        cache_key = (model if self.rules else "", defaults)
        if cache_key not in cache:
            if len(cache) >= MOST_CACHED_COUNTER_SETS:
                cache.clear()
            cache[cache_key] = self._find_counter_sets(model, defaults)
        found: tuple[CounterSet, ...] = cache[cache_key]
        return found

    def _find_counter_sets(self, model: str, defaults: Quota) -> tuple[CounterSet, ...]:
        own = quota.counter_set(self.id, self.quota, defaults)
        matching = (rule for rule in self.rules if model and rule.matches(model))
        return (own, *(quota.counter_set(f"{self.id}|{rule.pattern}", rule.quota, Quota()) for rule in matching))

    def packed(self) -> dict[str, object]:
        return {
            "id": self.id,
            "name": self.name,
            "models": self.models.patterns,
            **self.quota.packed(),
            "rules": [rule.packed() for rule in self.rules],
            "flags": sorted(self.flags),
            "prompt_log": self.prompt_log,
            "expires_at": self.expires_at,
            "weight": self.weight,
            "heartbeat_after_s": self.heartbeat_after_s,
        }


def unpack(packed: Mapping[str, Any]) -> Key:
    """A key from `Key.packed`, also of an earlier version, or from a row of the database, which gives the rules as JSON."""
    expires, rules = packed["expires_at"], packed["rules"]
    return Key(
        id=packed["id"],
        name=packed["name"],
        models=AllowList(tuple(packed["models"])),
        quota=quota.unpack(packed),
        rules=quota.unpack_rules(strict_json.read_loosely(rules.encode()) if isinstance(rules, str) else rules),
        flags=frozenset(packed["flags"]),
        prompt_log=packed["prompt_log"],
        expires_at=expires.timestamp() if isinstance(expires, datetime) else expires,
        weight=packed.get("weight", 1.0),
        heartbeat_after_s=packed.get("heartbeat_after_s"),
    )
