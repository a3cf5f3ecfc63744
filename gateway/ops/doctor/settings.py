"""Settings that are valid but unwise on this machine, and secrets that others can read, guess or intercept."""

import asyncio
import os
import re
import socket
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import urlsplit

from gateway import settings as reading
from gateway.components import chooses_nothing
from gateway.core.errors import SettingsError
from gateway.fleet.backends.config import BackendConfig
from gateway.ops.doctor.finding import Finding, ok, problem, warning
from gateway.settings import Settings

RESOLVE_S = 3.0
TIERS_ADVICE = 'give backends that are equals the same "tier" in OLLAMA_BACKENDS'
OTHERS = 0o077


async def examine(settings: Settings, env_file: Path) -> list[Finding]:
    return [
        readers(env_file),
        passwords(settings),
        await listening(settings),
        workers(settings),
        discovery(settings),
        routing(settings),
        *await asyncio.gather(*(transport(backend) for backend in settings.backends)),
    ]


def readers(env_file: Path) -> Finding:
    check = ".env"
    try:
        mode, text = env_file.stat().st_mode, env_file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ok(check, "none in this folder")
    if mode & OTHERS and holds_secret(text):
        return warning(check, f"has secrets and is readable by others (mode {mode & 0o777:o})", f"chmod 600 {env_file.name}")
    return ok(check, f"mode {mode & 0o777:o}, {'with' if holds_secret(text) else 'without'} secrets")


def holds_secret(text: str) -> bool:
    settings = re.findall(r"^[ \t]*([A-Z_]+)[ \t]*=[ \t]*['\"]?([^\s'\"].*)$", text, re.MULTILINE)
    return any(_is_secret(name, value) for name, value in settings)


def _is_secret(name: str, value: str) -> bool:
    """A URL is a secret if it has a password, a list of backends if it has a token."""
    if name in ("DATABASE_URL", "REDIS_URL"):
        return reading.masked(name.lower(), value) != value
    if name == "OLLAMA_BACKENDS":
        return "auth_token" in value
    return name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD") or reading.is_secret(name.lower())


def passwords(settings: Settings) -> Finding:
    try:
        reading.refuse_weak_secrets(settings)
    except SettingsError as weak:
        found, _, advice = str(weak).rpartition(": ")
        return problem("passwords", found, f"{advice} (`openssl rand -hex 24` makes a good one)")
    return ok("passwords", "none is short or well known")


async def listening(settings: Settings) -> Finding:
    host = settings.gateway_bind_host
    if settings.has_private_database and settings.sources["gateway_bind_host"] == "default":
        # `make run` sets this, which other commands do not see.
        host = "127.0.0.1"
    found = f"on {host}:{settings.gateway_bind_port}"
    if is_loopback(host):
        return ok("listening", f"{found}, this machine only")
    if proxies := await other_machines(settings.gateway_trusted_proxies):
        return ok("listening", f"{found}, proxies trusted: {', '.join(proxies)}")
    advice = "it serves plain HTTP: put a proxy with TLS in front and name it in GATEWAY_TRUSTED_PROXIES, or bind to 127.0.0.1"
    return warning("listening", f"{found}, open to all, no proxy named", advice)


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def other_machines(proxies: Iterable[str]) -> list[str]:
    """The entries that are networks of other machines, or names that resolve to other machines now."""
    named = list(proxies)
    are_others = await asyncio.gather(*(_is_another_machine(entry) for entry in named))
    return [entry for entry, is_other in zip(named, are_others, strict=True) if is_other]


async def _is_another_machine(entry: str) -> bool:
    try:
        return not ip_network(entry, strict=False).is_loopback
    except ValueError:
        return any(not is_loopback(address) for address in await addresses(entry))


async def addresses(name: str) -> list[str]:
    """The addresses of a host name; none if it does not resolve in time."""
    try:
        async with asyncio.timeout(RESOLVE_S):
            answers = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError, TimeoutError):
        return []
    return [str(answer[4][0]).partition("%")[0] for answer in answers]


def workers(settings: Settings) -> Finding:
    cores, wanted = os.cpu_count() or 1, settings.gateway_workers
    found = f"{wanted} on {cores} cores"
    if wanted > cores:
        return warning("workers", found, f"set GATEWAY_WORKERS to {cores} or less: more workers only share the same cores")
    return ok("workers", found)


def routing(settings: Settings) -> Finding:
    tiers = len({backend.tier for backend in settings.backends})
    found = f"{settings.routing}; {tiers} {'tier' if tiers == 1 else 'tiers'} of {len(settings.backends)} backends"
    if chooses_nothing(settings):
        return warning("routing", f"{found}: each is a tier of its own, so there is nothing to choose", TIERS_ADVICE)
    return ok("routing", found)


def discovery(settings: Settings) -> Finding:
    kept, every = settings.model_discovery_cache_ttl_s, settings.model_discovery_refresh_s
    found = f"polled every {every:g} s, kept for {kept:g} s"
    if kept < every:
        advice = "set MODEL_DISCOVERY_CACHE_TTL_S above MODEL_DISCOVERY_REFRESH_S: otherwise models vanish between two polls"
        return warning("discovery", found, advice)
    return ok("discovery", found)


async def transport(backend: BackendConfig) -> Finding:
    """A token must not cross the internet unencrypted; within a private network plain HTTP is usual."""
    check, parts = f"transport to {backend.name}", urlsplit(backend.base_url)
    if parts.scheme == "https":
        return ok(check, "encrypted")
    if not backend.auth_token:
        return ok(check, "plain HTTP, without a token")
    if any(ip_address(address).is_global for address in await addresses(str(parts.hostname))):
        advice = "use https:// in its base_url, or reach it over a private network"
        return problem(check, "the token crosses the internet unencrypted", advice)
    return ok(check, "plain HTTP, in a private network")
