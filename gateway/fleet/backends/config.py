"""The configuration of one backend, and the parser of `OLLAMA_BACKENDS`."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from gateway.dialects.dialect import Kind
from gateway.dialects.keep_alive import keep_alive_s
from gateway.dialects.model_names import NAME_RULE, canonical, is_glob, is_name

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
SECRET = re.compile(r"[\x21-\x7e]*")
BACKEND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
MOST_SLOTS, LARGEST_CONTEXT, LOWEST_TIER = 10_000, 2**31 - 1, 1_000_000

NumCtx = Literal["pass", "raise"] | int


@dataclass(frozen=True)
class ModelConfig:
    """What an entry sets for one model; None leaves the backend's.

    `num_ctx` is what becomes of a client's own: it is passed on, raised to the context that is loaded, or replaced by this
    number of tokens. `keep_alive_s` is infinite for "forever".
    """

    slots: int | None = None
    num_ctx: NumCtx = "raise"
    keep_alive_s: float | None = None


@dataclass(frozen=True)
class BackendConfig:
    """One server behind the gateway; timeouts in seconds.

    `slots` is 0 where it is to be found out. Backends of one `tier` are equals; a lower number comes first. `models` has
    canonical names.
    """

    name: str
    base_url: str
    kind: Kind = "ollama"
    auth_token: str = field(default="", repr=False)
    auth_header: str = "Authorization"
    auth_scheme: str = "Bearer"
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 600.0
    idle_timeout_s: float = 120.0
    total_timeout_s: float = 3600.0
    max_connections: int = 64
    tier: int = 1
    slots: int = 0
    models: Mapping[str, ModelConfig] = field(default_factory=dict, hash=False)

    def auth(self) -> dict[str, str]:
        """The header that authenticates us to this backend; the scheme is used with `Authorization` only."""
        if not self.auth_token:
            return {}
        if self.auth_header.lower() == "authorization" and self.auth_scheme:
            return {self.auth_header: f"{self.auth_scheme} {self.auth_token}"}
        return {self.auth_header: self.auth_token}


def url(text: str) -> str:
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        usable = usable and parts.username is None and not (parts.query or parts.fragment or re.search(r"\s", text))
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("an address such as http://host:11434, without credentials (they go into auth_token)")
    return text.rstrip("/")


def header_name(text: str) -> str:
    if not HEADER_NAME.fullmatch(text):
        raise ValueError("the name of an HTTP header")
    return text


def secret(text: str) -> str:
    if not SECRET.fullmatch(text):
        raise ValueError("printable ASCII without spaces")
    return text


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return value


def _name(value: object) -> str:
    name = _text(value)
    if not BACKEND_NAME.fullmatch(name):
        raise ValueError("1 to 63 letters, digits, '.', '_' or '-'")
    return name


def _kind(value: object) -> str:
    if value not in ("ollama", "openai"):
        raise ValueError("'ollama' or 'openai'")
    return str(value)


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86_400:
        raise ValueError("a number of seconds above 0, at most 86400")
    return float(value)


def _integer(high: int) -> Callable[[object], int]:
    def read(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ValueError(f"an integer from 1 to {high}")
        return value

    return read


def _num_ctx(value: object) -> NumCtx:
    if value == "pass" or value == "raise":
        return value
    try:
        return _integer(LARGEST_CONTEXT)(value)
    except ValueError as wrong:
        raise ValueError(f"'pass', 'raise' or {wrong}") from None


def _keep_alive(value: object) -> float:
    seconds = keep_alive_s(value)
    if seconds is None:
        raise ValueError("a number of seconds or a duration such as '5m'; -1 is forever")
    return seconds


_slots = _integer(MOST_SLOTS)
# The fields of a model: how each is read, and its name here.
_MODEL_FIELDS: dict[str, tuple[Callable[[object], Any], str]] = {
    "slots": (_slots, "slots"),
    "num_ctx": (_num_ctx, "num_ctx"),
    "keep_alive": (_keep_alive, "keep_alive_s"),
}


def _models(value: object) -> Mapping[str, ModelConfig]:
    if not isinstance(value, dict):
        raise ValueError(f"an object from names of models to objects with {', '.join(_MODEL_FIELDS)}")
    found: dict[str, ModelConfig] = {}
    for written, entry in value.items():
        if not is_name(written) or is_glob(written):
            raise ValueError(f"an object in which each name {NAME_RULE}, without '*', '?' and '['")
        name = canonical(written).canonical
        if name in found:
            raise ValueError(f"an object that names each model once ({written!r} is the same as a name before it)")
        found[name] = _model(written, entry)
    return found


def _model(written: str, entry: object) -> ModelConfig:
    if not isinstance(entry, dict):
        raise ValueError(f"an object in which {written!r} has an object with {', '.join(_MODEL_FIELDS)}")
    values: dict[str, Any] = {}
    for name, value in entry.items():
        if name not in _MODEL_FIELDS:
            raise ValueError(f"an object in which {written!r} has only the fields {', '.join(_MODEL_FIELDS)}, not {name!r}")
        read, here = _MODEL_FIELDS[name]
        try:
            values[here] = read(value)
        except ValueError as wrong:
            raise ValueError(f"an object in which {name!r} of {written!r} is {wrong}") from None
    return ModelConfig(**values)


_FIELDS: dict[str, Any] = {
    "name": _name,
    "base_url": lambda value: url(_text(value)),
    "kind": _kind,
    "auth_token": lambda value: secret(_text(value)),
    "auth_header": lambda value: header_name(_text(value)),
    "auth_scheme": lambda value: secret(_text(value)),
    "connect_timeout_s": _seconds,
    "read_timeout_s": _seconds,
    "idle_timeout_s": _seconds,
    "total_timeout_s": _seconds,
    "max_connections": _integer(100_000),
    "tier": _integer(LOWEST_TIER),
    "slots": _slots,
    "models": _models,
}


def read_backends(text: str, defaults: dict[str, Any]) -> tuple[BackendConfig, ...]:
    """The backends in order of priority; `defaults` are the values of fields that an entry omits. Each is its own tier then.

    Raises ValueError, whose message says what is wrong, without any value that may be a secret.
    """
    try:
        entries = json.loads(text)
    except ValueError as wrong:
        raise ValueError(f"the value is not valid JSON: {wrong}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError("the value must be a JSON list of at least one backend, each with 'name' and 'base_url'")
    backends = tuple(_read_backend(position, entry, defaults) for position, entry in enumerate(entries, 1))
    names = [backend.name for backend in backends]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"the name {min(twice)!r} is used more than once")
    return backends


def _read_backend(position: int, entry: object, defaults: dict[str, Any]) -> BackendConfig:
    if not isinstance(entry, dict):
        raise ValueError(f"entry {position} must be an object")
    if missing := [name for name in ("name", "base_url") if name not in entry]:
        raise ValueError(f"entry {position} has no {missing[0]!r}")
    values = {**defaults, "tier": position}
    for name, value in entry.items():
        if name not in _FIELDS:
            raise ValueError(f"entry {position} has an unknown field {name!r}; the fields are {', '.join(_FIELDS)}")
        try:
            values[name] = _FIELDS[name](value)
        except ValueError as wrong:
            raise ValueError(f"{name!r} of entry {position} must be {wrong}") from None
    return BackendConfig(**values)
