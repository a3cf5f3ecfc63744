"""`doctor`: checks the whole installation at once and reports what is fine, what is not, and what to do next."""

import argparse
import asyncio
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from threading import Thread
from typing import Any

from gateway.components import backends_of
from gateway.core.errors import CommandFailed, StoreUnavailable
from gateway.fleet import control, discovery, probe
from gateway.fleet.backends.backend import Backend
from gateway.ops.cli import console, installation, serve
from gateway.ops.cli.backends import discovering
from gateway.ops.doctor import models, postgres, redis
from gateway.ops.doctor import settings as doctor_settings
from gateway.ops.doctor.finding import GROUP_DEADLINE_S, Finding, guarded, ok, problem, warning
from gateway.settings import Settings
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient

OLDEST_PYTHON = (3, 11)
BACKENDS_ADVICE = "check OLLAMA_BACKENDS and OLLAMA_BASE_URL"
SLOW_MS = 1000
ENTRY_HINTS = (discovery.LEAVE_OFF_V1, discovery.IS_OPENAI, discovery.IS_IT_OPENAI)
LISTENING = (
    "Ollama on another machine listens on 127.0.0.1 unless it has OLLAMA_HOST=0.0.0.0, llama-server needs --host 0.0.0.0"
)


class ForgottenThreads(ThreadPoolExecutor):
    """Nothing waits for their end: a name server that does not answer delays only the query to it."""

    def submit(self, work: Callable[..., Any], /, *values: Any, **named: Any) -> "Future[Any]":
        future: Future[Any] = Future()

        def carry_out() -> None:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(work(*values, **named))
            except BaseException as wrong:  # noqa: BLE001 # the caller handles it
                future.set_exception(wrong)

        Thread(target=carry_out, daemon=True).start()
        return future


@contextmanager
def stores_if_any() -> Iterator[Settings]:
    """As for other commands; if the private stores do not start, the settings without them."""
    with ExitStack() as stack:
        try:
            settings = stack.enter_context(installation.stores_of())
        except CommandFailed as failed:
            console.notify(f"the private stores do not start: {failed}")
            settings = installation.read()
        yield settings


async def examine(settings: Settings, arguments: argparse.Namespace) -> None:
    """Raises CommandFailed if there is a problem; warnings are only reported."""
    findings = await check_all(settings)
    rows = [
        {"check": found.check, "state": found.state, "found": found.found, "what_to_do": found.advice or None}
        for found in findings
    ]
    console.show(rows, as_json=arguments.json, empty="")
    states = [found.state for found in findings]
    summary = f"problems: {states.count('problem')}, warnings: {states.count('warning')}"
    if "problem" in states:
        raise CommandFailed(f"{summary}: see what to do above")
    console.notify(summary)


async def check_all(settings: Settings) -> list[Finding]:
    """Everything concurrently, so that a check that hangs delays no other."""
    asyncio.get_running_loop().set_default_executor(ForgottenThreads())
    checks = [
        ("settings", doctor_settings.examine(settings, installation.project() / ".env"), "see .env.example"),
        ("PostgreSQL", _postgres(settings), postgres.ADVICE),
        ("Redis", _redis(settings), redis.ADVICE),
        ("backends", _backends(settings), BACKENDS_ADVICE),
        ("running gateways", _running(settings), BACKENDS_ADVICE),
        ("models", _catalog(settings), models.ALIASES_ADVICE),
    ]
    groups = await asyncio.gather(
        *(guarded(name, check, advice, deadline_s=GROUP_DEADLINE_S) for name, check, advice in checks)
    )
    return [found for group in (*groups, [python(), accelerators()]) for found in group]


async def _postgres(settings: Settings) -> list[Finding]:
    of_one_process = settings.database_pool_size + settings.database_pool_overflow
    return await postgres.examine(
        settings.database_url,
        most_connections=settings.gateway_workers * of_one_process,
        migrates_itself=settings.has_private_database,
    )


async def _redis(settings: Settings) -> list[Finding]:
    is_needed = settings.sources["redis_url"] != "default" or settings.gateway_workers > 1
    return await redis.examine(settings.redis_url, is_needed=is_needed)


async def _backends(settings: Settings) -> list[Finding]:
    async with backends_of(settings) as backends:
        found = await asyncio.gather(*(_guarded_backend(backend) for backend in backends.values()))
    return [one for group in found for one in group]


async def _running(settings: Settings) -> list[Finding]:
    """Whether these settings name the backends of the running gateways."""
    async with RedisClient(settings.redis_url) as store:
        try:
            fleet = await control.other_fleet(store, settings.backends)
        except CommandFailed as differ:
            return [warning("running gateways", str(differ), BACKENDS_ADVICE)]
    if fleet is None:
        return []
    found = f"have other backends than these settings: {control.named_in_words(fleet)}"
    return [warning("running gateways", found, "set OLLAMA_BACKENDS here as it is set there")]


async def _catalog(settings: Settings) -> list[Finding]:
    try:
        async with discovering(settings) as (found, _, configs):
            catalog = found.catalog
    except CommandFailed:
        # Running gateways with different backends: another check reports that.
        return []
    of_aliases = models.aliases(catalog) if settings.model_aliases else []
    of_slots = [*models.slots(catalog, configs), *models.waits(catalog, await _waits(settings))]
    return [*of_aliases, *of_slots, *models.digests(catalog, settings.digest_parity)]


async def _waits(settings: Settings) -> Sequence[Mapping[str, Any]]:
    """None are known without PostgreSQL, or with a schema of before, which other checks report."""
    if not settings.database_url:
        return []
    with suppress(StoreUnavailable):
        async with Database(settings.database_url, size=1) as database:
            return [dict(row) for row in await database.rows("count_waits")]
    return []


async def _guarded_backend(backend: Backend) -> list[Finding]:
    advice = f"check its address ({backend.config.base_url}) and that it runs"
    return await guarded(f"backend {backend.name}", _backend(backend, advice), advice)


async def _backend(backend: Backend, advice: str) -> list[Finding]:
    seen = await probe.probe(backend)
    check = f"backend {backend.name}"
    if seen["token"] in ("REFUSED", "MISSING"):
        how = "set OLLAMA_AUTH_TOKEN, or its auth_token in OLLAMA_BACKENDS"
        return [problem(check, f"its token is {seen['token'].lower()}", how)]
    if seen["problem"]:
        return [problem(check, seen["problem"], _advice(seen["problem"], advice))]
    dialects = ", ".join(seen["speaks"])
    found = f"{seen['models']} models in {seen['latency_ms']} ms, token {seen['token']}, speaks {dialects}"
    if not seen["models"]:
        return [warning(check, found, "give it a model (Ollama: `ollama pull NAME`)")]
    if seen["latency_ms"] > SLOW_MS:
        return [warning(check, found, "check what keeps it busy, or move it closer")]
    return [ok(check, found)]


def _advice(error: str, otherwise: str) -> str:
    if hint := next((hint for hint in ENTRY_HINTS if error.endswith(hint)), ""):
        return hint
    return f"{otherwise}; {LISTENING}" if error.startswith("unreachable") else otherwise


def python() -> Finding:
    version = platform.python_version()
    is_new = tuple(map(int, platform.python_version_tuple()[:2])) >= OLDEST_PYTHON
    return ok("Python", version) if is_new else problem("Python", version, "use Python 3.11 or newer")


def accelerators() -> Finding:
    if missing := serve.missing_accelerators():
        advice = "install the pinned requirements: without them the gateway is slow"
        return warning("accelerators", f"missing: {', '.join(missing)}", advice)
    return ok("accelerators", "all installed")
