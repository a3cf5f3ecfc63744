"""The models of all backends and who offers them: one immutable map, which is replaced as a whole."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from gateway.dialects.model_entries import has_name, native_entry, openai_entry, reported_digest, whole_number
from gateway.dialects.model_names import AllowList, ModelName, canonical
from gateway.fleet.aliases import NO_ALIASES, Alias, Aliases
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.slots import is_remote, slots_of

Entries = tuple[dict[str, Any], ...]
NO_CONFIGS: Mapping[str, BackendConfig] = {}


@dataclass(frozen=True)
class Snapshot:
    """The last answers of one backend; `answered_at` and `asked_at` in seconds since the epoch, 0 for never."""

    backend: str
    base_url: str
    kind: str
    answered_at: float = 0.0
    version: str = ""
    models: Entries = ()
    error: str = ""
    latency_ms: float = 0.0
    asked_at: float = 0.0
    # The optional paths that it has, and when that was found out.
    routes: tuple[str, ...] = ()
    routes_at: float = 0.0
    # How many calls it answers at once, as it reports: by model, and under "" for all. Whether it loads and unloads models.
    slots: Mapping[str, int] = field(default_factory=dict)
    swaps: bool = False

    @property
    def state(self) -> str:
        return f"away: {self.error}" if self.error else "up"

    def packed(self) -> dict[str, Any]:
        # An earlier version takes no snapshot without its running models.
        return {**asdict(self), "running": ()}


# A process of a later version may store more.
SNAPSHOT_FIELDS = frozenset(declared.name for declared in fields(Snapshot))


def unpack(packed: Mapping[str, Any]) -> Snapshot:
    """A snapshot from Redis, which anybody may have written: raises ValueError, TypeError or KeyError where it is invalid."""
    models = tuple(_checked(entry) for entry in packed["models"])
    routes = tuple(route for route in packed.get("routes", ()) if isinstance(route, str))
    times = {name: float(packed[name]) for name in ("answered_at", "asked_at")}
    known = {name: value for name, value in packed.items() if name in SNAPSHOT_FIELDS}
    slots = {name: count for name, count in packed.get("slots", {}).items() if whole_number(count)}
    more = {"routes": routes, "routes_at": float(packed.get("routes_at", 0.0)), "slots": slots}
    return Snapshot(**{**known, **times, **more, "models": models})


def _checked(entry: dict[str, Any]) -> dict[str, Any]:
    if not has_name(entry, "name") or not isinstance(entry.get("openai", {}), dict):
        raise ValueError("not an entry of a list of models")
    return native_entry(entry)


@dataclass(frozen=True)
class Offer:
    """One backend's copy of a model, under that backend's spelling; valid until that backend's list is too old.

    `slots` is how many calls with it the backend answers at once, and `size` its bytes, 0 if unknown. `swaps`: the backend
    loads it on demand and unloads others for it. `digest` is empty if the backend reports none.
    """

    backend: str
    kind: str
    spelling: str
    good_until: float
    routes: frozenset[str] = frozenset()
    model: str = ""
    slots: int = 1
    slots_source: str = "default"
    size: int = 0
    swaps: bool = False
    tier: int = 1
    digest: str = ""


@dataclass(frozen=True)
class Model:
    """One model with its offers in order of priority; its list entries are those of the first backend.

    An alias is a model, too: its offers are those of its `targets`, and calls for it are counted as its own name, or as the
    glob which that matches.
    """

    name: ModelName
    offers: tuple[Offer, ...]
    native: dict[str, Any]
    openai: dict[str, Any]
    targets: "tuple[Model, ...]" = ()
    counted_as: str = ""

    @cached_property
    def context(self) -> int:
        """Tokens of prompt and answer together if a server such as vLLM refuses a call that needs more; else 0."""
        if self.targets:
            return min((target.context for target in self.targets if target.context), default=0)
        return whole_number(self.openai.get("max_model_len"))

    def is_listed(self, now: float) -> bool:
        return any(offer.good_until > now for offer in self.offers)


@dataclass(frozen=True)
class Catalog:
    models: Mapping[str, Model] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    cache_s: float = 0.0
    aliases: Aliases = NO_ALIASES
    # The models that globs lead to, by glob.
    by_glob: Mapping[str, Model] = field(default_factory=dict)
    # The models of one name whose copies differ: who has which digest.
    different: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)

    def find(self, name: ModelName, allowed: AllowList) -> Model | None:
        """None for an unknown model and for one that is not allowed; both take the same steps, and so the same time."""
        model = self.models.get(name.canonical)
        alias = self.aliases.of(name) if self.aliases.globs else None
        is_allowed = allowed.allows(name.canonical, cloud=name.cloud or (model is not None and model.name.cloud))
        if not is_allowed:
            return None
        return model if model is not None or alias is None else self._by_glob(alias, name)

    def lookup(self, name: ModelName) -> Model | None:
        """The model of this name for operators, who may know of each."""
        alias = self.aliases.of(name)
        return self.models.get(name.canonical) or (self._by_glob(alias, name) if alias else None)

    def is_known(self, name: ModelName) -> bool:
        """Whether this is a model or an alias, also one that leads to nothing."""
        return name.canonical in self.models or self.aliases.of(name) is not None

    def offer(self, backend: str, model: str) -> Offer | None:
        """A backend's copy of the model with this canonical name."""
        known = self.models.get(model)
        for offer in () if known is None else known.offers:
            if offer.backend == backend:
                return offer
        return None

    @property
    def size(self) -> int:
        """How many models there are, without aliases."""
        return sum(not model.targets for model in self.models.values())

    def reached(self, alias: Alias) -> Model | None:
        """What an alias leads to."""
        return (self.by_glob if alias.is_glob else self.models).get(alias.name)

    def _by_glob(self, alias: Alias, name: ModelName) -> Model | None:
        model = self.by_glob.get(alias.name)
        return None if model is None else _named(model, name.canonical, name.canonical)

    def listed(self, allowed: AllowList) -> list[Model]:
        now = time.time()
        return [
            model
            for model in self.models.values()
            if model.is_listed(now) and allowed.allows(model.name.canonical, cloud=model.name.cloud)
        ]

    def running_models(self, allowed: AllowList, reported: Mapping[str, Entries]) -> list[dict[str, Any]]:
        """`reported` is what each backend runs."""
        listed = dict.fromkeys(model.name.canonical for model in self.listed(allowed))
        found: dict[str, dict[str, Any]] = {}
        at_backends: dict[tuple[str, str], dict[str, Any]] = {}
        for snapshot in self.fresh_snapshots():
            for entry in reported.get(snapshot.backend, ()):
                name = canonical(entry["name"]).canonical
                at_backends.setdefault((snapshot.backend, name), entry)
                if name in listed and not self.models[name].targets:
                    found.setdefault(name, entry)
        for model in (self.models[name] for name in listed):
            if model.targets and (running := _running(model, at_backends)):
                found[model.name.canonical] = {**running, "name": model.name.canonical, "model": model.name.canonical}
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


def _running(alias: Model, at_backends: Mapping[tuple[str, str], dict[str, Any]]) -> dict[str, Any] | None:
    copies = ((offer.backend, canonical(offer.spelling).canonical) for offer in alias.offers)
    return next((at_backends[copy] for copy in copies if copy in at_backends), None)


def build(
    snapshots: Iterable[Snapshot],
    cache_s: float,
    aliases: Aliases = NO_ALIASES,
    configs: Mapping[str, BackendConfig] = NO_CONFIGS,
    *,
    is_digest_decisive: bool = False,
) -> Catalog:
    """All models, offers in order of priority: `snapshots` are in the operator's order of backends, `configs` by name.

    With `is_digest_decisive`, a copy of a model that differs from the first one is no copy of it.
    """
    in_order = tuple(snapshots)
    found: dict[str, Model] = {}
    for snapshot in in_order:
        config, routes = configs.get(snapshot.backend), frozenset(snapshot.routes)
        for entry in snapshot.models:
            model = _model_of(entry, _offer_of(snapshot, entry, cache_s, routes, config))
            known = found.get(model.name.canonical)
            found[model.name.canonical] = _with_offer(known, model) if known else model
    different = _different(found)
    if is_digest_decisive:
        now = time.time()
        found |= {name: _of_one_digest(found[name], now) for name in different}
    named, by_glob = _with_aliases(found, aliases)
    return Catalog(named, in_order, cache_s, aliases, by_glob, different)


def digests_in_words(digests: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{short_digest(digest)} on {backend}" for backend, digest in digests)


def short_digest(digest: str) -> str:
    return digest[:12]


def _different(models: Mapping[str, Model]) -> dict[str, tuple[tuple[str, str], ...]]:
    """The models whose copies differ; a copy without a digest equals all others."""
    found = {}
    for name, model in models.items():
        if len(model.offers) > 1 and len({offer.digest for offer in model.offers if offer.digest}) > 1:
            found[name] = tuple((offer.backend, offer.digest) for offer in model.offers if offer.digest)
    return found


def _of_one_digest(model: Model, now: float) -> Model:
    """With the copies that equal the first one; only if none has been seen lately, that may be an outdated one."""
    known = [offer for offer in model.offers if offer.digest]
    first = next((offer for offer in known if offer.good_until > now), known[0])
    return replace(model, offers=tuple(offer for offer in model.offers if offer.digest in ("", first.digest)))


def _with_aliases(models: dict[str, Model], aliases: Aliases) -> tuple[dict[str, Model], dict[str, Model]]:
    """The models with the aliases of one name, which replace models of that name; and what globs lead to."""
    reached = {alias.name: model for alias in aliases if (model := _reached(alias, models))}
    named = {name: model for name, model in models.items() if name not in aliases.exact}
    named |= {name: reached[name] for name in aliases.exact if name in reached}
    return named, {alias.name: reached[alias.name] for alias in aliases.globs if alias.name in reached}


def _reached(alias: Alias, models: Mapping[str, Model]) -> Model | None:
    """Its entries in lists are those of the first target that a backend offers now."""
    known = tuple(models[target] for target in alias.targets if target in models)
    targets = tuple(model for model in known if not model.name.cloud)
    if not targets:
        return None
    now = time.time()
    shown = next((model for model in targets if model.is_listed(now)), targets[0])
    offers = tuple(offer for model in targets for offer in model.offers)
    name = ModelName(alias.name, cloud=False)
    return _named(Model(name, offers, shown.native, shown.openai, targets, alias.name), alias.name, alias.written)


def _named(alias: Model, name: str, written: str) -> Model:
    native = {**alias.native, "name": name, "model": name}
    return replace(alias, name=ModelName(name, cloud=False), native=native, openai={**alias.openai, "id": written})


def _with_offer(known: Model, more: Model) -> Model:
    if any(offer.backend == more.offers[0].backend for offer in known.offers):
        return known
    # One cloud copy makes the model a cloud model: a failover must not send a prompt off the site.
    name = ModelName(known.name.canonical, known.name.cloud or more.name.cloud)
    return Model(name, known.offers + more.offers, known.native, known.openai)


def _model_of(entry: dict[str, Any], offer: Offer) -> Model:
    cloud = canonical(entry["name"]).cloud or is_remote(entry)
    shown = dict(entry)
    shown.pop("openai", None)
    return Model(ModelName(offer.model, cloud), (offer,), shown, entry.get("openai") or openai_entry(entry))


def _offer_of(
    snapshot: Snapshot, entry: dict[str, Any], cache_s: float, routes: frozenset[str], config: BackendConfig | None
) -> Offer:
    name = canonical(entry["name"]).canonical
    slots, source = slots_of(config, snapshot.slots, snapshot.kind, name, entry)
    return Offer(
        snapshot.backend,
        snapshot.kind,
        entry["name"],
        snapshot.answered_at + cache_s,
        routes,
        name,
        slots,
        source,
        whole_number(entry["size"]) or whole_number(entry.get("openai", {}).get("meta", {}).get("size")),
        snapshot.swaps if snapshot.kind == "openai" else not is_remote(entry),
        config.tier if config else 1,
        reported_digest(entry),
    )


def keep_created(fresh: Snapshot, known: Snapshot) -> Snapshot:
    """Each model keeps the creation time that was seen first: many servers report the current time."""
    first = {entry["name"]: entry for entry in known.models if "openai" in entry}
    return replace(fresh, models=tuple(_as_created(entry, first.get(entry["name"])) for entry in fresh.models))


def _as_created(entry: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    created = first["openai"].get("created") if first else 0
    if first is None or "openai" not in entry or not created:
        return entry
    return {**entry, "modified_at": first["modified_at"], "openai": {**entry["openai"], "created": created}}
