"""The settings, read once from the environment and `.env` into a frozen dataclass."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote

from starlette.config import Config

from gateway.core import setting_names
from gateway.core.errors import SettingsError
from gateway.core.millionths import MILLION, Millionths
from gateway.fleet.aliases import NO_ALIASES, Aliases, read_aliases
from gateway.fleet.backends.config import MOST_SLOTS, BackendConfig, header_name, read_backends, secret, url
from gateway.stores import urls

HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
WEAK_SECRETS = frozenset(
    "admin change-me change_me changeit changeme default example gateway letmein ollama passwd password postgres qwerty "
    "root secret test token 12345 123456 12345678".split()
)
MASK = "***"
LOCAL_RUN = "local run"
COMPOSE_ONLY = (
    "GATEWAY_VIRTUAL_HOST",
    "LETSENCRYPT_EMAIL",
    "OLLAMA_DATA_VOLUME",
    "POSTGRES_DATA_VOLUME",
    "POSTGRES_USER",
    "POSTGRES_PASSWORD",
    "POSTGRES_DB",
    "REDIS_PASSWORD",
)


def integer(low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or not low <= int(text) <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return int(text)

    return read


def seconds(low: float, high: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        if not re.fullmatch(r"\d{1,9}(\.\d{1,6})?", text) or not low <= float(text) <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return float(text)

    return read


def seconds_or_never(text: str) -> float | None:
    if text.lower() == "never":
        return None
    try:
        return seconds(0, 86_400)(text)
    except ValueError as wrong:
        raise ValueError(f"'never' or {wrong}") from None


def part(text: str) -> Millionths:
    if not re.fullmatch(r"0?\.\d{1,6}|0|1(\.0{1,6})?", text):
        raise ValueError("a number from 0 to 1, with at most six decimals")
    whole, _, decimals = text.partition(".")
    return Millionths(int(whole or 0) * MILLION + int(decimals.ljust(6, "0")))


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise ValueError("true or false")
    return text.lower() in ("true", "1", "yes")


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        found = next((choice for choice in choices if choice.lower() == text.lower()), None)
        if found is None:
            raise ValueError(f"{', '.join(choices[:-1])} or {choices[-1]}")
        return found

    return read


def bind_host(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_.:-]+", text):
        raise ValueError("an address or host name to listen on, such as 0.0.0.0 or ::")
    return text


def proxies(text: str) -> tuple[str, ...]:
    """Addresses, networks (CIDR) and host names, separated by commas."""
    entries = tuple(entry.strip() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if not HOST_NAME.fullmatch(entry) and not _is_network(entry):
            raise ValueError(f"addresses, CIDRs and host names separated by commas ({entry!r} is none of these)")
    return entries


def networks(text: str) -> tuple[str, ...]:
    """Addresses and networks (CIDR), separated by commas."""
    entries = tuple(entry.strip() for entry in text.split(",") if entry.strip())
    for entry in entries:
        if not _is_network(entry):
            raise ValueError(f"addresses and CIDRs separated by commas ({entry!r} is neither)")
    return entries


def _is_network(text: str) -> bool:
    try:
        ip_network(text, strict=False)
    except ValueError:
        return False
    return True


DATABASE_SCHEMES = ("postgresql+asyncpg", "postgresql", "postgres")
REDIS_SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster")
HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:]*)(:(?P<port>\d{0,5}))?")


def database_url(text: str) -> str:
    parts = _split(text)
    if parts is None or parts.scheme not in DATABASE_SCHEMES:
        raise ValueError("an address such as postgresql+asyncpg://user:password@host:5432/database")
    return "postgresql" + text[len(parts.scheme) :]


def redis_url(text: str) -> str:
    parts = _split(text)
    if parts is None or parts.scheme not in REDIS_SCHEMES or not _names_a_place(parts):
        raise ValueError(
            "an address such as redis://host:6379/0, rediss://…, unix:///path, redis+sentinel://host:26379,host/master/0 "
            "or redis+cluster://host:6379,host:6379"
        )
    return text


def _split(text: str) -> SplitResult | None:
    """None if it is not a URL with usable hosts and ports."""
    parts = urls.split(text)
    hosts = [HOST_AND_PORT.fullmatch(host) for host in parts.netloc.rpartition("@")[2].split(",")]
    usable = parts.netloc.isascii() and all(host and int(host["port"] or 0) < 2**16 for host in hosts)
    return None if re.search(r"\s", text) or not usable else parts


def _names_a_place(parts: SplitResult) -> bool:
    if parts.scheme == "unix":
        return bool(parts.path)
    path = parts.path.strip("/")
    number = path.partition("/")[2] if "sentinel" in parts.scheme else path
    if "cluster" in parts.scheme and number not in ("", "0"):
        # A cluster has one database only.
        return False
    return bool(re.fullmatch(r"\d{0,5}", number))


def text(value: str) -> str:
    return value


def env(default: str, read: Callable[[str], Any] = text, *, is_secret: bool = False) -> Any:
    return field(metadata={"default": default, "read": read, "secret": is_secret}, repr=not is_secret)


@dataclass(frozen=True)
class Settings:
    """Each field but the last three is the environment variable of the same name in capitals."""

    gateway_bind_host: str = env("0.0.0.0", bind_host)  # noqa: S104 # a container listens on all its addresses  # nosec B104
    gateway_bind_port: int = env("8080", integer(0, 65535))
    gateway_workers: int = env("1", integer(1, 64))
    gateway_log_level: str = env("INFO", one_of("DEBUG", "INFO", "WARNING", "ERROR"))
    gateway_log_format: str = env("json", one_of("json", "console"))
    gateway_request_id_header: str = env("X-Request-ID", header_name)
    gateway_trusted_proxies: tuple[str, ...] = env("127.0.0.1,nginx-proxy", proxies)
    gateway_drain_s: float = env("30", seconds(0, 3600))
    ollama_base_url: str = env("http://ollama:11434", url)
    ollama_connect_timeout_s: float = env("5", seconds(0.05, 300))
    ollama_read_timeout_s: float = env("600", seconds(0.1, 86_400))
    ollama_idle_timeout_s: float = env("120", seconds(0.1, 86_400))
    ollama_total_timeout_s: float = env("3600", seconds(0.1, 86_400))
    ollama_max_connections: int = env("64", integer(1, 100_000))
    ollama_slots: int = env("0", integer(0, MOST_SLOTS))
    ollama_auth_token: str = env("", secret, is_secret=True)
    ollama_auth_header: str = env("Authorization", header_name)
    ollama_auth_scheme: str = env("Bearer", secret)
    ollama_backends: str = env("", is_secret=True)
    model_discovery_refresh_s: float = env("60", seconds(0.2, 86_400))
    model_discovery_cache_ttl_s: float = env("120", seconds(0.2, 86_400))
    loaded_models_refresh_s: float = env("2", seconds(0.05, 3600))
    model_aliases: str = env("")
    routing: str = env("order", one_of("order", "warm", "fast"))
    routing_spill_s: float | None = env("never", seconds_or_never)
    routing_sticky_s: float = env("600", seconds(0, 86_400))
    queue_wait_s: float = env("300", seconds(0, 86_400))
    queue_size: int = env("512", integer(0, 10**6))
    queue_tokens: int = env("4000000", integer(0, 10**12))
    sub_user_header: str = env("X-OpenWebUI-User-Id", header_name)
    digest_parity: str = env("warn", one_of("warn", "distinct"))
    database_url: str = env("", database_url, is_secret=True)
    database_pool_size: int = env("10", integer(1, 1000))
    database_pool_overflow: int = env("20", integer(0, 1000))
    redis_url: str = env("redis://redis:6379/0", redis_url, is_secret=True)
    redis_key_cache_ttl_s: float = env("60", seconds(1, 86_400))
    default_rpm: int = env("60", integer(0, 10**9))
    default_tpm: int = env("100000", integer(0, 10**12))
    default_concurrent: int = env("8", integer(0, 10**6))
    cached_tokens_weight: int = env("0.1", part)
    max_queue_wait_s: float = env("0", seconds(0, 600))
    limits_without_redis: str = env("share", one_of("share", "closed"))
    max_request_body_bytes: int = env("8388608", integer(1024, 2**30))
    max_upload_bytes: int = env("26214400", integer(1024, 2**30))
    max_num_predict: int = env("32768", integer(1, 10**9))
    max_keep_alive_s: float = env("1800", seconds(1, 604_800))
    strip_volatile_prompt_lines: bool = env("true", boolean)
    argon2_time_cost: int = env("3", integer(1, 100))
    argon2_memory_cost_kib: int = env("65536", integer(8, 4 * 2**20))
    argon2_parallelism: int = env("4", integer(1, 64))
    auth_failure_rate_limit_per_ip_per_min: int = env("20", integer(1, 10**6))
    audit_buffer_size: int = env("1000", integer(1, 10**7))
    prompt_log_default_retention_days: int = env("30", integer(1, 36_500))
    audit_log_default_retention_days: int = env("365", integer(1, 36_500))
    metrics_token: str = env("", secret, is_secret=True)
    metrics_allow: tuple[str, ...] = env("", networks)
    dashboard_enabled: bool = env("false", boolean)
    playground_enabled: bool = env("false", boolean)
    playground_file: str = env("")
    docs_enabled: bool = env("false", boolean)
    backends: tuple[BackendConfig, ...] = ()
    aliases: Aliases = NO_ALIASES
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def has_private_database(self) -> bool:
        return self.sources.get("database_url") == LOCAL_RUN

    def shown(self) -> list[tuple[str, str, str]]:
        """Name, value with secrets masked, and where it comes from."""
        rows = []
        for declared in declarations():
            value = getattr(self, declared.name)
            words = ",".join(value) if isinstance(value, tuple) else _plain(value)
            rows.append((declared.name.upper(), masked(declared.name, words), self.sources[declared.name]))
        return rows


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def masked(name: str, value: str) -> str:
    if not value:
        return ""
    if name in ("database_url", "redis_url"):
        return _without_password(value)
    if name == "ollama_backends":
        hidden = [{**entry, "auth_token": MASK} if entry.get("auth_token") else entry for entry in json.loads(value)]
        return json.dumps(hidden, ensure_ascii=False)
    return MASK if is_secret(name) else value


def _without_password(address: str) -> str:
    scheme, _, rest = address.partition("://")
    login, at, place = rest.rpartition("@")
    user, colon, _ = login.partition(":")
    place = re.sub(r"([?&][^=&]*(?:pass|%)[^=&]*=)[^&]*", r"\1***", place, flags=re.IGNORECASE)
    return f"{scheme}://{user}{colon and ':***'}{at}{place}"


def declarations() -> list[Any]:
    return [declared for declared in fields(Settings) if "read" in declared.metadata]


def is_secret(name: str) -> bool:
    return any(declared.metadata["secret"] for declared in declarations() if declared.name == name)


def known_names() -> set[str]:
    names = {declared.name.upper() for declared in declarations()}
    secrets = {f"{declared.name.upper()}_FILE" for declared in declarations() if declared.metadata["secret"]}
    return names | secrets | set(COMPOSE_ONLY)


def load(environ: Mapping[str, str], env_file: Path | None, overrides: Mapping[str, tuple[str, str]] | None = None) -> Settings:
    """Reads the environment, then `.env`, then the defaults; `overrides` (name -> value, source) replace defaults.

    Raises SettingsError with one line that names the variable and valid values.
    """
    config = _config(environ, env_file)
    setting_names.refuse_unknown(config.environ, config.file_values, known_names())
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for declared in declarations():
        raw, source = _find(config, declared, overrides or {})
        values[declared.name] = _read(declared, raw)
        sources[declared.name] = source
    return Settings(**values, backends=_backends(values), aliases=_aliases(values), sources=sources)


def _config(environ: Mapping[str, str], env_file: Path | None) -> Config:
    try:
        return Config(env_file if env_file and env_file.is_file() else None, environ=environ)
    except (OSError, UnicodeDecodeError) as wrong:
        raise SettingsError(f"{env_file} must be a readable text file in UTF-8: {type(wrong).__name__}") from None


def _find(config: Config, declared: Any, overrides: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """The raw text and its source; an empty value counts as unset, because compose files pass empty ones."""
    name = declared.name.upper()
    if declared.metadata["secret"] and (path := config(f"{name}_FILE", default="")):
        if config(name, default=""):
            raise SettingsError(f"{name} and {name}_FILE are both set: keep one")
        return _file_content(f"{name}_FILE", path), f"{name}_FILE"
    if value := config(name, default=""):
        return value, "environment" if config.environ.get(name) else ".env"
    return overrides.get(name, (declared.metadata["default"], "default"))


def _file_content(name: str, path: str) -> str:
    try:
        content = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as wrong:
        raise SettingsError(f"{name} must name a readable file: {type(wrong).__name__}") from None
    if not content:
        raise SettingsError(f"{name} must name a file that is not empty")
    return content


def _read(declared: Any, raw: str) -> Any:
    if not raw:
        return raw
    try:
        return declared.metadata["read"](raw)
    except ValueError as wrong:
        raise SettingsError(f"{declared.name.upper()} must be {wrong}{_quoted(declared, raw)}") from None


def _quoted(declared: Any, raw: str) -> str:
    """The wrong value, except of variables where people put secrets by mistake."""
    if declared.metadata["secret"] or declared.name.startswith("ollama_auth_"):
        return ""
    return f", not {re.sub('//.*@', '//***@', raw)!r}"


def _backends(values: dict[str, Any]) -> tuple[BackendConfig, ...]:
    shared = {name: values[f"ollama_{name}"] for name in ("connect_timeout_s", "read_timeout_s", "idle_timeout_s")}
    shared |= {name: values[f"ollama_{name}"] for name in ("total_timeout_s", "max_connections", "slots")}
    if values["ollama_backends"]:
        try:
            return read_backends(values["ollama_backends"], shared)
        except ValueError as wrong:
            raise SettingsError(f"OLLAMA_BACKENDS: {wrong}") from None
        except RecursionError:
            raise SettingsError("OLLAMA_BACKENDS: the value is nested too deeply") from None
    auth = {name: values[f"ollama_{name}"] for name in ("auth_token", "auth_header", "auth_scheme")}
    return (BackendConfig("default", values["ollama_base_url"], **auth, **shared),)


def _aliases(values: dict[str, Any]) -> Aliases:
    try:
        return read_aliases(values["model_aliases"]) if values["model_aliases"] else NO_ALIASES
    except ValueError as wrong:
        raise SettingsError(f"MODEL_ALIASES: {wrong}") from None


def refuse_weak_secrets(settings: Settings) -> None:
    """Raises SettingsError on secrets that anybody could guess; a database behind a Unix socket needs no password."""
    for name in ("database_url", "redis_url"):
        user, password, is_remote = _login(getattr(settings, name))
        if is_remote and (name == "database_url" or password) and _is_weak(password, user):
            raise SettingsError(f"{name.upper()} must carry a password nobody can guess: set one of 12 or more characters")
    if settings.metrics_token and _is_weak(settings.metrics_token, None, shortest=12):
        raise SettingsError("METRICS_TOKEN must be hard to guess: set one of 12 or more characters")
    variable = "OLLAMA_BACKENDS" if settings.ollama_backends else "OLLAMA_AUTH_TOKEN"
    for backend in settings.backends:
        if backend.auth_token and _is_weak(backend.auth_token, None, shortest=1):
            raise SettingsError(f"{variable}: the auth token of backend {backend.name!r} is a well-known default: set another")


def _login(url: str) -> tuple[str, str, bool]:
    """User, password, and whether the server may be on another machine."""
    parts = urls.split(url)
    login, _, host = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    asked = {name: values[-1] for name, values in parse_qs(parts.query).items()}
    place = host or asked.get("host", "")
    is_remote = bool(place) and not place.startswith("/") and parts.scheme != "unix"
    return unquote(user) or asked.get("user", ""), unquote(password) or asked.get("password", ""), is_remote


def _is_weak(password: str, user: str | None, shortest: int = 8) -> bool:
    return len(password) < shortest or password.lower() in WEAK_SECRETS or password == user
