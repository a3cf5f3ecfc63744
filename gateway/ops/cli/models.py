"""The verbs for a model on backends: load it, unload it, pull it."""

import argparse
import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any

from gateway.components import backends_of, discovery_of
from gateway.core.errors import CommandFailed
from gateway.fleet import control, jobs
from gateway.fleet.drains import Drains
from gateway.fleet.jobs import Rows
from gateway.fleet.model_jobs import ModelJobs
from gateway.ops.cli import console, progress
from gateway.ops.cli.backends import running_fleet
from gateway.ops.cli.database import current_database
from gateway.ops.cli.progress import ProgressPrinter, size
from gateway.settings import Settings
from gateway.stores.redis_client import RedisClient

# What becomes of a job whose command is interrupted.
INTERRUPTED = {
    "warm": "interrupted: Ollama gives the load up, llama.cpp goes on with it",
    "unload": "interrupted: what a backend was asked to unload is unloaded",
    "pull": "interrupted: the connections are closed, so Ollama ends its pulls; the next pull goes on from there",
}


async def warm(settings: Settings, arguments: argparse.Namespace) -> None:
    found = await _do(
        settings, "warm", {"model": arguments.model, "backend": arguments.backend}, progress.printer(as_json=False)
    )
    rows = [{**_named(row), "load_s": row["load_s"]} for row in found]
    console.show(rows, as_json=arguments.json, empty="")
    _check(found)


async def unload(settings: Settings, arguments: argparse.Namespace) -> None:
    found = await _do(
        settings, "unload", {"model": arguments.model, "backend": arguments.backend}, progress.printer(as_json=False)
    )
    rows = [{**_named(row), **_freed(row, as_json=arguments.json)} for row in found]
    console.show(rows, as_json=arguments.json, empty="")
    _check(found)


async def pull(settings: Settings, arguments: argparse.Namespace) -> None:
    """With --json, each line is a change of one backend."""
    wanted = {"model": arguments.model, "backends": arguments.backends}
    found = await _do(settings, "pull", wanted, progress.printer(as_json=arguments.json))
    if not arguments.json:
        rows = [{**_named(row), "size": size(row["total_bytes"] or None), "seconds": row["seconds"]} for row in found]
        console.show(rows, as_json=False, empty="")
    _check(found)


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("backend", "model", "state", "detail")}


def _freed(row: Mapping[str, Any], *, as_json: bool) -> dict[str, Any]:
    return {"freed_bytes": row["freed_bytes"]} if as_json else {"freed": size(row["freed_bytes"])}


def _check(rows: Rows) -> None:
    if failed := jobs.failed(rows):
        raise CommandFailed(f"failed on {', '.join(failed)}")


async def _do(settings: Settings, verb: str, arguments: Mapping[str, Any], printer: ProgressPrinter) -> Rows:
    """Carried out by the running gateway if these settings have other backends, else here; returns the last rows."""
    rows: Rows = []
    try:
        async with running_fleet(settings) as (store, fleet):
            found = _here(settings, store, verb, arguments) if fleet is None else control.follow(store, fleet, verb, arguments)
            async with aclosing(found):
                async for rows in found:
                    printer.show(rows)
    except asyncio.CancelledError:
        console.notify(INTERRUPTED[verb])
        raise
    return rows


async def _here(settings: Settings, store: RedisClient, verb: str, arguments: Mapping[str, Any]) -> AsyncGenerator[Rows, None]:
    async with AsyncExitStack() as stack:
        backends = await stack.enter_async_context(backends_of(settings))
        discovery = await stack.enter_async_context(discovery_of(settings, backends, store))
        if verb == "warm":
            # A drained backend is known by the database alone.
            database = await stack.enter_async_context(current_database(settings))
            await stack.enter_async_context(Drains(database, store, backends))
        job = await stack.enter_async_context(await ModelJobs(backends, discovery, store).plan(verb, arguments))
        async for rows in job.progress():
            yield rows
