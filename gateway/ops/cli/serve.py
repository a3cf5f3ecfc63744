"""The long-running verbs: `serve` in a deployment, `worker` under it, `run` on one's own machine."""

import asyncio
import logging
import os
import socket
import subprocess  # starts the demonstration backend, our own code  # nosec B404
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

from gateway import app
from gateway.auth.key_store import KeyStore, NewKey
from gateway.components import Components, database_of, hasher_of
from gateway.core import background
from gateway.core.errors import CommandFailed
from gateway.edge import memory, server
from gateway.edge.workers import Workers, end_with_parent
from gateway.fleet import discovery
from gateway.ops.cli import console, installation
from gateway.ops.cli.database import require_schema
from gateway.settings import Settings
from gateway.stores import migrations
from gateway.telemetry import logs, metrics

LOG = logging.getLogger("gateway")
DEMONSTRATION = [
    "            a demonstration, not a real model: it only repeats the prompt. For real models start Ollama here, or",
    "            name your backends in .env (OLLAMA_BACKENDS, see .env.example), and run `make run` again",
]
LOCAL_HOST, FIRST_KEY = "127.0.0.1", "local"
PROBE_S = 0.5
STOP_MARGIN_S = 15.0
# By then each backend has answered or timed out.
FIRST_LISTS_WITHIN_S = discovery.POLL_DEADLINE_S


def missing_accelerators() -> list[str]:
    return [name for name in ("uvloop", "httptools", "hiredis", "aiohttp._http_parser") if find_spec(name) is None]


def check_accelerators() -> None:
    """The C extensions make the gateway several times faster: warns where one is missing."""
    if missing := missing_accelerators():
        LOG.warning("running slowly without %s: install the pinned requirements", ", ".join(missing))


def bind(settings: Settings) -> socket.socket:
    host, port = settings.gateway_bind_host, settings.gateway_bind_port
    try:
        return server.listen(host, port)
    except OSError as wrong:
        raise CommandFailed(f"cannot listen on {host}:{port} ({wrong.strerror}): set GATEWAY_BIND_HOST or _PORT") from None


def serve(settings: Settings) -> None:
    logs.configure(settings.gateway_log_level, settings.gateway_log_format)
    with bind(settings) as listener:
        _serve_on(listener, settings, lambda _: None)


def _serve_on(listener: socket.socket, settings: Settings, on_ready: Callable[[Components | None], None]) -> None:
    check_accelerators()
    LOG.info("listening on %s:%d, %d workers", *listener.getsockname()[:2], settings.gateway_workers)
    if settings.gateway_workers == 1:
        server.run(_serve_one(settings, listener, on_ready))
    else:
        _serve_many(settings, listener, on_ready)


def _serve_many(settings: Settings, listener: socket.socket, on_ready: Callable[[Components | None], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="nz-metrics-") as folder:
        os.environ[metrics.FOLDER_VARIABLE] = folder
        workers = Workers(
            listener,
            settings.gateway_workers,
            settings.gateway_drain_s + STOP_MARGIN_S,
            on_ready=lambda: on_ready(None),
            on_end=partial(metrics.merge_ended, Path(folder)),
        )
        asyncio.run(workers.run())


async def _serve_one(
    settings: Settings,
    listener: socket.socket,
    on_ready: Callable[[Components | None], None],
    metrics_folder: Path | None = None,
) -> None:
    serves = asyncio.Event()

    async def report_ready(components: Components) -> None:
        await serves.wait()
        await _until_lists_are_there(components)
        on_ready(components)

    trimming = memory.trimming_task()
    async with app.build(settings, metrics_folder, [trimming]) as (application, components):
        parts = application, components.in_flight, components.scope_timer
        one = server.Server(*parts, drain_s=settings.gateway_drain_s, on_ready=serves.set)
        reporting = asyncio.create_task(report_ready(components), name="banner")
        try:
            async with memory.bounded_memory(trimming):
                await one.serve([listener])
        finally:
            await background.end([reporting])


async def _until_lists_are_there(components: Components) -> None:
    """A backend that was started just now may miss the first poll."""
    with suppress(TimeoutError):
        await asyncio.wait_for(components.discovery.has_asked_all.wait(), FIRST_LISTS_WITHIN_S)


def worker(settings: Settings, descriptor: int, parent: int) -> None:
    end_with_parent(parent)
    logs.configure(settings.gateway_log_level, settings.gateway_log_format)
    with socket.socket(fileno=descriptor) as listener:
        listener.setblocking(False)
        folder = Path(os.environ[metrics.FOLDER_VARIABLE])
        server.run(_serve_one(settings, listener, lambda _: None, folder))


def run() -> None:
    """One command for a machine of one's own: stores, schema, a backend, a key and the gateway."""
    with installation.stores_of(run=True) as named, _backend(named) as base_url:
        settings = _with_backend(named, base_url) if base_url else named
        _hand_on(settings)
        is_demonstration = base_url not in ("", installation.OLLAMA_HERE)
        # The port first: if it is in use, the first key would be created and never shown.
        with bind(settings) as listener:
            first_key = asyncio.run(_prepare(settings))
            logs.configure(settings.gateway_log_level, settings.gateway_log_format)
            _serve_on(
                listener,
                settings,
                lambda components: print(banner(settings, components, first_key, is_demonstration), flush=True),
            )
    console.notify("stopped; data and keys are kept for the next `make run`")


def _with_backend(settings: Settings, base_url: str) -> Settings:
    installation.note_backend_of_run(base_url)
    return replace(settings, ollama_base_url=base_url, backends=(replace(settings.backends[0], base_url=base_url),))


def _hand_on(settings: Settings) -> None:
    """Workers read their settings from the environment, so what was decided here is set there."""
    os.environ.update(DATABASE_URL=settings.database_url, REDIS_URL=settings.redis_url)
    os.environ.update(DATABASE_URL_FILE="", REDIS_URL_FILE="")
    os.environ.update({name: str(getattr(settings, name.lower())) for name in installation.DEFAULTS_OF_RUN})
    os.environ["OLLAMA_BASE_URL"] = settings.ollama_base_url


async def _prepare(settings: Settings) -> str | None:
    """Brings the schema up to date; returns a new key if there was none."""
    async with database_of(settings) as database:
        await migrations.migrate(database, console.notify)
        await require_schema(database)
        key_store = KeyStore(database, hasher_of(settings), None)
        if await key_store.count():
            return None
        _, key = await key_store.make(NewKey(FIRST_KEY))
        return key


def banner(settings: Settings, components: Components | None, first_key: str | None, is_demonstration: bool = False) -> str:
    address = f"http://{settings.gateway_bind_host}:{settings.gateway_bind_port}"
    key = first_key or "YOUR_KEY"
    lines = ["", f"  neuronetz-gateway listens on {address}", ""]
    lines += _seen(components) if components else ["  backends: see `make models`"]
    lines += DEMONSTRATION if is_demonstration else []
    lines += [
        "",
        f"  key       {first_key}  (shown only once)"
        if first_key
        else "  key       the one that you already have; `make key NAME=…` creates another",
    ]
    lines += _wider_limits(settings)
    model = _chat_model(components)
    body = f'{{"model":"{model}","stream":true,"messages":[{{"role":"user","content":"Say hello"}}]}}'
    lines += [
        "",
        f"  try it{_advice(components)}:",
        f"curl -N {address}/v1/chat/completions -H 'Authorization: Bearer {key}' -d '{body}'",
        f"export OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY={key}",
        f"export ANTHROPIC_BASE_URL={address} ANTHROPIC_AUTH_TOKEN={key}",
        "",
        "  Ctrl-C stops everything; data and keys are kept.",
        "",
    ]
    return "\n".join(lines)


def _wider_limits(settings: Settings) -> list[str]:
    """The limits that are higher than in a deployment."""
    wider = [
        f"{name}={value}"
        for name, value in installation.LIMITS_OF_RUN.items()
        if settings.sources[name.lower()] == installation.LOCAL
    ]
    words = "  limits    higher than in a deployment, for one person; set others in .env"
    return [words, *(f"            {' '.join(wider[at : at + 3])}" for at in range(0, len(wider), 3))] if wider else []


def _seen(components: Components) -> list[str]:
    lines = []
    for snapshot in components.discovery.catalog.snapshots:
        names = ", ".join(entry["name"] for entry in snapshot.models[:8]) + (", …" if len(snapshot.models) > 8 else "")
        state = names or ("no model yet" if snapshot.answered_at else "has not answered yet")
        state = f"DOWN ({snapshot.error})" if snapshot.error else state
        lines.append(f"  backend   {snapshot.backend} at {snapshot.base_url}: {state}")
    return lines


def _advice(components: Components | None) -> str:
    """What to do before the first call if there is no model for it."""
    if components is None:
        return ", with a name from `make models` for MODEL"
    if components.discovery.catalog.models:
        return ""
    return ", once there is a model (`make probe` shows what is wrong, `make refresh` polls again), with its name for MODEL"


def _chat_model(components: Components | None) -> str:
    models = list(components.discovery.catalog.models.values()) if components else []
    able = [model for model in models if "completion" in model.native.get("capabilities", ["completion"])]
    return str((able or models)[0].native["name"]) if models else "MODEL"


@contextmanager
def _backend(settings: Settings) -> Iterator[str]:
    """The URL of a backend if none is configured: an Ollama on this machine, else the demonstration backend."""
    configured = settings.ollama_backends or settings.sources["ollama_base_url"] in ("environment", ".env")
    if configured:
        yield ""
    elif _answers(installation.OLLAMA_HERE):
        yield installation.OLLAMA_HERE
    else:
        with demonstration() as url:
            yield url


def _answers(url: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url + "/api/version", timeout=PROBE_S):
            return True
    except (OSError, HTTPException):
        return False


@contextmanager
def demonstration() -> Iterator[str]:
    """The demonstration backend, in a process that ends with this one."""
    with server.listen(LOCAL_HOST, 0) as listener:
        descriptor, port = listener.fileno(), listener.getsockname()[1]
        command = [sys.executable, "-m", "gateway", "demo", str(descriptor), str(os.getpid())]
        process = subprocess.Popen(command, pass_fds=[descriptor], start_new_session=True)  # nosec B603
    try:
        yield f"http://{LOCAL_HOST}:{port}"
    finally:
        process.terminate()
        process.wait(10)
