"""The configuration of one backend, and the parser of `OLLAMA_BACKENDS`."""

import json
import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from gateway.dialects.dialect import Kind

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
SECRET = re.compile(r"[\x21-\x7e]*")
BACKEND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class BackendConfig:
    """One server behind the gateway; timeouts in seconds."""

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


def _connections(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 100_000:
        raise ValueError("an integer from 1 to 100000")
    return value


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
    "max_connections": _connections,
}


def read_backends(text: str, defaults: dict[str, Any]) -> tuple[BackendConfig, ...]:
    """The backends in order of priority; `defaults` are the values of fields that an entry omits.

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
    values = dict(defaults)
    for name, value in entry.items():
        if name not in _FIELDS:
            raise ValueError(f"entry {position} has an unknown field {name!r}; the fields are {', '.join(_FIELDS)}")
        try:
            values[name] = _FIELDS[name](value)
        except ValueError as wrong:
            raise ValueError(f"{name!r} of entry {position} must be {wrong}") from None
    return BackendConfig(**values)
