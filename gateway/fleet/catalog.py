"""Which backend has which model: what the backends said, as one immutable map that is replaced whole."""

import hashlib
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from gateway.dialects.model_names import LONGEST_NAME, AllowList, ModelName, canonical, is_name

EMPTY_DETAILS = {"parent_model": "", "format": "", "family": "", "families": [], "parameter_size": "", "quantization_level": ""}
MOST_MODELS, DEEPEST_ENTRY = 10_000, 8
# What clients size their context and their answers by, as vLLM, llama.cpp, LM Studio and services name it. All are numbers.
SIZES = (
    "max_model_len context_length context_window max_context_length loaded_context_length max_input_tokens max_output_tokens "
    "max_completion_tokens"
).split()
CONTEXT = ("max_model_len", "loaded_context_length", "context_length", "context_window", "max_context_length")
META = "n_ctx n_ctx_train n_vocab vocab_type n_embd n_params size".split()
# The model that a name stands for; a path on the backend is nobody's business.
ROOT = re.compile(r"[A-Za-z0-9_][\w.-]*(/[\w.-]+)?", re.ASCII)
LARGEST_SIZE = 2**53


@dataclass(frozen=True)
class Snapshot:
    """What one backend last said of itself; `answered_at` and `asked_at` in seconds since the epoch, 0 where it never was."""

    backend: str
    base_url: str
    kind: str
    answered_at: float = 0.0
    version: str = ""
    models: tuple[dict[str, Any], ...] = ()
    running: tuple[dict[str, Any], ...] = ()
    error: str = ""
    latency_ms: float = 0.0
    asked_at: float = 0.0

    @property
    def state(self) -> str:
        return f"away: {self.error}" if self.error else "up"

    def packed(self) -> dict[str, Any]:
        return asdict(self)


def unpack(packed: Mapping[str, Any]) -> Snapshot:
    """A snapshot out of the store, which anybody may have written: raises ValueError, TypeError or KeyError on nonsense."""
    lists = {name: tuple(_sound(entry) for entry in packed[name]) for name in ("models", "running")}
    return Snapshot(**{**packed, **lists, "answered_at": float(packed["answered_at"]), "asked_at": float(packed["asked_at"])})


def _sound(entry: dict[str, Any]) -> dict[str, Any]:
    if not _has_name(entry, "name") or not isinstance(entry.get("openai", {}), dict):
        raise ValueError("not an entry of a list of models")
    return _native_entry(entry)


@dataclass(frozen=True)
class Offer:
    """One backend's copy of a model, under that backend's own spelling; good until the backend's list is too old."""

    backend: str
    kind: str
    spelling: str
    good_until: float


@dataclass(frozen=True)
class Model:
    """One model of the fleet with its offers in priority order; its list entries are the first backend's."""

    name: ModelName
    offers: tuple[Offer, ...]
    native: dict[str, Any]
    openai: dict[str, Any]

    @cached_property
    def context(self) -> int:
        """Tokens of prompt and answer together where a server refuses a wish for more than fits, else 0: vLLM says so."""
        return _whole(self.openai.get("max_model_len"))

    def is_listed(self, now: float) -> bool:
        return any(offer.good_until > now for offer in self.offers)


@dataclass(frozen=True)
class Catalog:
    models: Mapping[str, Model] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    cache_s: float = 0.0

    def find(self, name: ModelName, allowed: AllowList) -> Model | None:
        """None alike for an unknown model and for one that is not allowed: both are looked up either way."""
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

    def running(self, allowed: AllowList, told: Mapping[str, tuple[float, tuple[dict[str, Any], ...]]]) -> list[dict[str, Any]]:
        """`told` is what backends have said they run, and when: the later of that and of their snapshots counts."""
        listed = {model.name.canonical for model in self.listed(allowed)}
        found: dict[str, dict[str, Any]] = {}
        for snapshot in self.fresh_snapshots():
            at, entries = told.get(snapshot.backend, (0.0, ()))
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
    """The union in priority order: `snapshots` come in the operator's order of backends."""
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
    # One cloud copy makes the model a cloud model: failing over must not take a prompt off the site.
    name = ModelName(known.name.canonical, known.name.cloud or more.name.cloud)
    return Model(name, known.offers + more.offers, known.native, known.openai)


def _model_of(snapshot: Snapshot, entry: dict[str, Any], cache_s: float) -> Model:
    spelling = entry["name"]
    name, cloud = canonical(spelling)
    offer = Offer(snapshot.backend, snapshot.kind, spelling, snapshot.answered_at + cache_s)
    shown = dict(entry)
    shown.pop("openai", None)
    is_remote = bool(entry.get("remote_host") or entry.get("remote_model"))
    return Model(ModelName(name, cloud or is_remote), (offer,), shown, entry.get("openai") or _openai_entry(entry))


def _openai_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    namespace = entry["name"].rpartition("/")[0].rpartition("/")[2]
    return {"id": entry["name"], "object": "model", "created": _unix(entry), "owned_by": namespace or "library"}


def _unix(entry: Mapping[str, Any]) -> int:
    try:
        return int(datetime.fromisoformat(entry["modified_at"]).timestamp())
    except (ValueError, OverflowError):
        return 0


def read_tags(answer: object) -> tuple[dict[str, Any], ...]:
    """The models of `/api/tags` or `/api/ps`, completed with what clients break without; raises ValueError on others."""
    models = answer.get("models") if isinstance(answer, dict) else None
    if not isinstance(models, list):
        raise ValueError("no list of models")
    return tuple(_native_entry(entry) for entry in models[:MOST_MODELS] if _has_name(entry, "name", "model"))


def read_openai_models(answer: object) -> tuple[dict[str, Any], ...]:
    """The models of `/v1/models` as native entries with their OpenAI entry inside; raises ValueError on anything else."""
    data = answer.get("data") if isinstance(answer, dict) and not answer.get("error") else None
    if not isinstance(data, list):
        raise ValueError("no list of models")
    return tuple(_from_openai(entry) for entry in data[:MOST_MODELS] if _has_name(entry, "id"))


def _has_name(entry: object, *names: str) -> bool:
    """Whether a caller could ask for it, and it can be told on: what nobody can name, or what is nested deep, is left out."""
    return isinstance(entry, dict) and is_name(_name_in(entry, names)) and _is_short(entry, names) and _is_flat(entry)


def _is_short(entry: Mapping[str, Any], fields: Iterable[str]) -> bool:
    return all(len(entry[field]) <= LONGEST_NAME for field in fields if isinstance(entry.get(field), str))


def _name_in(entry: Mapping[str, Any], fields: Iterable[str]) -> str:
    return next((entry[field] for field in fields if isinstance(entry.get(field), str) and entry[field]), "")


def _is_flat(value: object, levels: int = DEEPEST_ENTRY) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_flat(each, levels - 1) for each in inner if isinstance(each, dict | list))


def _native_entry(entry: dict[str, Any]) -> dict[str, Any]:
    name = _name_in(entry, ("name", "model"))
    digest, details = entry.get("digest"), entry.get("details")
    told = {key: value for key, value in details.items() if value is not None} if isinstance(details, dict) else {}
    details = {**EMPTY_DETAILS, **told}
    return {
        **entry,
        "name": name,
        "model": entry["model"] if isinstance(entry.get("model"), str) and entry["model"] else name,
        "modified_at": entry["modified_at"] if isinstance(entry.get("modified_at"), str) else "1970-01-01T00:00:00Z",
        "size": entry["size"] if isinstance(entry.get("size"), int) else 0,
        "digest": digest if isinstance(digest, str) and len(digest) >= 12 else _digest(name),
        "details": details,
    }


def _from_openai(entry: dict[str, Any]) -> dict[str, Any]:
    created = entry.get("created")
    unix = int(created) if isinstance(created, int | float) and 0 <= created < 2**33 else 0
    shown: dict[str, Any] = {
        "id": entry["id"],
        "object": "model",
        "created": unix,
        "owned_by": str(entry.get("owned_by") or "library"),
    }
    shown |= {name: entry[name] for name in SIZES if _whole(entry.get(name))}
    meta = entry.get("meta")
    if isinstance(meta, dict) and (kept := {name: meta[name] for name in META if _whole(meta.get(name))}):
        shown["meta"] = kept
    root = entry.get("root")
    if isinstance(root, str) and ROOT.fullmatch(root):
        shown["root"] = root
    modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix))
    native = _native_entry({"name": entry["id"], "modified_at": modified, "capabilities": ["completion"]})
    return {**native, "openai": shown}


def _whole(value: object) -> int:
    """A number of tokens, bytes or parameters that a backend told, else 0."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_SIZE else 0


def context_of(entry: Mapping[str, Any]) -> int:
    """The tokens that a model's OpenAI entry says it holds, 0 where it says nothing."""
    found = [entry.get("meta", {}).get("n_ctx"), *(entry.get(name) for name in CONTEXT)]
    return next((length for value in found if (length := _whole(value))), 0)


def keep_created(fresh: Snapshot, known: Snapshot) -> Snapshot:
    """Each model's time as first seen: many servers say "now" whenever they are asked."""
    first = {entry["name"]: entry for entry in known.models if "openai" in entry}
    return replace(fresh, models=tuple(_as_created(entry, first.get(entry["name"])) for entry in fresh.models))


def _as_created(entry: dict[str, Any], first: dict[str, Any] | None) -> dict[str, Any]:
    created = first["openai"].get("created") if first else 0
    if first is None or "openai" not in entry or not created:
        return entry
    return {**entry, "modified_at": first["modified_at"], "openai": {**entry["openai"], "created": created}}


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
