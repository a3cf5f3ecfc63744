"""The models of all backends and who offers them: one immutable map, which is replaced as a whole."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from gateway.dialects.model_entries import has_name, native_entry, openai_entry, whole_number
from gateway.dialects.model_names import AllowList, ModelName, canonical

Entries = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Snapshot:
    """The last answers of one backend; `answered_at` and `asked_at` in seconds since the epoch, 0 for never."""

    backend: str
    base_url: str
    kind: str
    answered_at: float = 0.0
    version: str = ""
    models: Entries = ()
    running: Entries = ()
    error: str = ""
    latency_ms: float = 0.0
    asked_at: float = 0.0

    @property
    def state(self) -> str:
        return f"away: {self.error}" if self.error else "up"

    def packed(self) -> dict[str, Any]:
        return asdict(self)


def unpack(packed: Mapping[str, Any]) -> Snapshot:
    """A snapshot from Redis, which anybody may have written: raises ValueError, TypeError or KeyError where it is invalid."""
    lists = {name: tuple(_checked(entry) for entry in packed[name]) for name in ("models", "running")}
    return Snapshot(**{**packed, **lists, "answered_at": float(packed["answered_at"]), "asked_at": float(packed["asked_at"])})


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    if not has_name(entry, "name") or not isinstance(entry.get("openai", {}), dict):
        raise ValueError("not an entry of a list of models")
    return native_entry(entry)


@dataclass(frozen=True)
class Offer:
    """One backend's copy of a model, under that backend's spelling; valid until that backend's list is too old."""

    backend: str
    kind: str
    spelling: str
    good_until: float


@dataclass(frozen=True)
class Model:
    """One model with its offers in order of priority; its list entries are those of the first backend."""

    name: ModelName
    offers: tuple[Offer, ...]
    native: dict[str, Any]
    openai: dict[str, Any]

    @cached_property
    def context(self) -> int:
        """Tokens of prompt and answer together if a server such as vLLM refuses a call that needs more; else 0."""
        return whole_number(self.openai.get("max_model_len"))

    def is_listed(self, now: float) -> bool:
        return any(offer.good_until > now for offer in self.offers)


@dataclass(frozen=True)
class Catalog:
    models: Mapping[str, Model] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    cache_s: float = 0.0

    def find(self, name: ModelName, allowed: AllowList) -> Model | None:
        """None for an unknown model and for one that is not allowed; both take the same steps, and so the same time."""
        model = self.models.get(name.canonical)
        is_allowed = allowed.allows(name.canonical, cloud=name.cloud or (model is not None and model.name.cloud))
        return model if is_allowed else None

    def listed(self, allowed: AllowList) -> list[Model]:
        now = time.time()
        return [
            model
            for model in self.models.values()
            if model.is_listed(now) and allowed.allows(model.name.canonical, cloud=model.name.cloud)
        ]

    def running_models(self, allowed: AllowList, reported: Mapping[str, tuple[float, Entries]]) -> list[dict[str, Any]]:
        """`reported` is when each backend answered last, and with what; its snapshot counts where that is newer."""
        listed = {model.name.canonical for model in self.listed(allowed)}
        found: dict[str, dict[str, Any]] = {}
        for snapshot in self.fresh_snapshots():
            at, entries = reported.get(snapshot.backend, (0.0, ()))
            for entry in entries if at >= snapshot.answered_at else snapshot.running:
                name = canonical(entry["name"]).canonical
                if name in listed:
                    found.setdefault(name, entry)
        return list(found.values())

    def fresh_snapshots(self) -> list[Snapshot]:
        oldest = time.time() - self.cache_s
        return [snapshot for snapshot in self.snapshots if snapshot.answered_at > oldest]

    def lowest_version(self) -> str | None:
        versions = [_dotted(snapshot.version) for snapshot in self.fresh_snapshots() if snapshot.kind == "ollama"]
        numbers = [version for version in versions if version]
        return ".".join(map(str, min(numbers))) if numbers else None


def _dotted(version: str) -> tuple[int, ...]:
    parts = version.removeprefix("v").split("-")[0].split("+")[0].split(".")
    return tuple(int(part) for part in parts) if all(part.isdecimal() and len(part) < 9 for part in parts) else ()


def build(snapshots: Iterable[Snapshot], cache_s: float) -> Catalog:
    """All models, offers in order of priority: `snapshots` are in the operator's order of backends."""
    in_order = tuple(snapshots)
    found: dict[str, Model] = {}
    for snapshot in in_order:
        for entry in snapshot.models:
            model = _model_of(snapshot, entry, cache_s)
            known = found.get(model.name.canonical)
            found[model.name.canonical] = _with_offer(known, model) if known else model
    return Catalog(found, in_order, cache_s)


def _with_offer(known: Model, more: Model) -> Model:
    if any(offer.backend == more.offers[0].backend for offer in known.offers):
        return known
    # One cloud copy makes the model a cloud model: a failover must not send a prompt off the site.
    name = ModelName(known.name.canonical, known.name.cloud or more.name.cloud)
    return Model(name, known.offers + more.offers, known.native, known.openai)


def _model_of(snapshot: Snapshot, entry: dict[str, Any], cache_s: float) -> Model:
    spelling = entry["name"]
    name, cloud = canonical(spelling)
    offer = Offer(snapshot.backend, snapshot.kind, spelling, snapshot.answered_at + cache_s)
    shown = dict(entry)
    shown.pop("openai", None)
    is_remote = bool(entry.get("remote_host") or entry.get("remote_model"))
    return Model(ModelName(name, cloud or is_remote), (offer,), shown, entry.get("openai") or openai_entry(entry))


def keep_created(fresh: Snapshot, known: Snapshot) -> Snapshot:
    """Each model keeps the creation time that was seen first: many servers report the current time."""
    first = {entry["name"]: entry for entry in known.models if "openai" in entry}
    return replace(fresh, models=tuple(_as_created(entry, first.get(entry["name"])) for entry in fresh.models))


def _as_created(entry: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    created = first["openai"].get("created") if first else 0
    if first is None or "openai" not in entry or not created:
        return entry
    return {**entry, "modified_at": first["modified_at"], "openai": {**entry["openai"], "created": created}}
