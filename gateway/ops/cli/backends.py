"""The verbs for backends: list their models, poll them again, probe, drain and undrain."""

import argparse
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from gateway.components import backends_of, discovery_of
from gateway.core.errors import CommandFailed
from gateway.dialects.model_names import canonical
from gateway.fleet import control, drains
from gateway.fleet import probe as fleet_probe
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Catalog, Snapshot
from gateway.fleet.control import FleetFacts
from gateway.fleet.discovery import Discovery
from gateway.fleet.load import stored as stored_loads
from gateway.fleet.residents import BackendLoad
from gateway.fleet.slots import slots_of
from gateway.fleet.ways import speaks, translated
from gateway.ops.cli import console
from gateway.ops.cli.database import current_database
from gateway.settings import Settings
from gateway.stores.redis_client import RedisClient, RedisUnavailable

OPERATOR = "operator"
# How old the knowledge of running gateways may be.
LOADED_KNOWN_S = 60.0


@asynccontextmanager
async def running_fleet(settings: Settings) -> AsyncIterator[tuple[RedisClient, FleetFacts | None]]:
    """The store, and the backends of the running gateways where they differ from these settings, which is reported."""
    async with RedisClient(settings.redis_url) as store:
        fleet = await control.other_fleet(store, settings.backends)
        if fleet is not None:
            console.notify("these are the running gateway's backends; this command's own settings name others")
        yield store, fleet


@asynccontextmanager
async def discovering(settings: Settings) -> AsyncIterator[tuple[Discovery, RedisClient, Sequence[BackendConfig]]]:
    """The models of the backends, and which backends these are: those of the running gateways, else those of these settings."""
    async with running_fleet(settings) as (store, fleet):
        if fleet is not None:
            configs = control.configs_of(fleet)
            unopened = {config.name: Backend(config) for config in configs}
            yield await discovery_of(settings, unopened, store).only_stored(), store, configs
            return
        async with backends_of(settings) as backends, discovery_of(settings, backends, store) as discovery:
            yield discovery, store, settings.backends


async def list_models(settings: Settings, arguments: argparse.Namespace) -> None:
    async with discovering(settings) as (discovery, store, configs):
        stored = await discovery.stored_catalog()
        catalog = discovery.catalog
        loads = await _loads(store, [config.name for config in configs])
    by_name = {config.name: config for config in configs}
    rows = [
        {**_model_row(snapshot, entry, by_name[snapshot.backend], loads.get(snapshot.backend)), "state": snapshot.state}
        for snapshot in catalog.snapshots
        for entry in snapshot.models
    ]
    facts = {
        "models": catalog.size,
        "map_age_s": round(time.time() - stored[0], 1) if stored else None,
        "map_bytes": stored[1] if stored else None,
    }
    aliases = _alias_rows(catalog)
    if arguments.json:
        console.show_facts({**facts, "backends": rows, "aliases": aliases}, as_json=True)
        return
    console.show(rows, as_json=False, empty="no backend has a model (see `make probe`)")
    if aliases:
        print()
        console.show([{**row, "targets": ", then ".join(row["targets"])} for row in aliases], as_json=False, empty="")
    age = f"map in Redis: {facts['map_age_s']} s old, {facts['map_bytes']} bytes" if stored else "no map in Redis"
    print(f"\n{facts['models']} different models; {age}")


async def _loads(store: RedisClient, backends: list[str]) -> dict[str, BackendLoad]:
    with suppress(RedisUnavailable):
        return await stored_loads(store, backends)
    return {}


def _model_row(snapshot: Snapshot, entry: dict[str, Any], config: BackendConfig, load: BackendLoad | None) -> dict[str, Any]:
    name = canonical(entry["name"]).canonical
    slots = slots_of(config, snapshot.slots, snapshot.kind, name, entry)
    return {
        "backend": snapshot.backend,
        "model": entry["name"],
        "size": _size(entry["size"]),
        "slots": slots.number,
        "slots_from": slots.source,
        "loaded": _loaded(snapshot, name, load),
        "native": speaks(snapshot.kind, snapshot.routes),
        "translated": translated(snapshot.kind, snapshot.routes),
    }


def _loaded(snapshot: Snapshot, model: str, load: BackendLoad | None) -> str | None:
    """None if that is not known: no gateway has asked lately."""
    now = time.time()
    if snapshot.kind == "openai" and not snapshot.swaps:
        return "always"
    if load is None or now - load.at > LOADED_KNOWN_S:
        return None
    resident = next((one for one in load.residents if one.model == model), None)
    if resident is None:
        return "no"
    left = "" if resident.until is None else f", {max(0.0, resident.until - now):.0f} s left"
    return _size(resident.size_vram).replace("-", "yes") + left


def _alias_rows(catalog: Catalog) -> list[dict[str, Any]]:
    """Each alias with the models of its chain, and the copies to which a call goes, in order."""
    now, rows = time.time(), []
    for alias in catalog.aliases:
        model = catalog.reached(alias)
        offers = [offer for offer in model.offers if offer.good_until > now] if model else []
        copies = ", ".join(f"{offer.spelling} on {offer.backend}" for offer in offers)
        rows.append({"alias": alias.written, "targets": list(alias.targets), "leads_to": copies or "NOTHING"})
    return rows


def _size(count: object) -> str:
    if not isinstance(count, int) or count <= 0:
        return "-"
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"


async def refresh(settings: Settings, arguments: argparse.Namespace) -> None:
    """Polls every backend now; the running gateways use the new map at once."""
    async with running_fleet(settings) as (store, fleet):
        if fleet is not None:
            rows = await control.ask(store, fleet, "refresh")
        else:
            async with backends_of(settings) as backends, discovery_of(settings, backends, store) as discovery:
                rows = await discovery.refreshed()
        is_announced = store.up
    console.show(rows, as_json=arguments.json, empty="no backends")
    if not is_announced:
        console.notify("Redis does not answer: running gateways refresh on their own schedule")


async def probe(settings: Settings, arguments: argparse.Namespace) -> None:
    async with running_fleet(settings) as (store, fleet):
        if fleet is not None:
            rows = await control.ask(store, fleet, "probe")
        else:
            async with backends_of(settings) as backends:
                rows = await fleet_probe.probe_all(backends)
    console.show(rows, as_json=arguments.json, empty="no backends")
    if any(row["problem"] for row in rows):
        raise CommandFailed("some backends cannot be used: see their problems above")


async def drain_backend(settings: Settings, arguments: argparse.Namespace) -> None:
    await _mark(settings, arguments, drained=True)


async def undrain_backend(settings: Settings, arguments: argparse.Namespace) -> None:
    await _mark(settings, arguments, drained=False)


async def _mark(settings: Settings, arguments: argparse.Namespace, *, drained: bool) -> None:
    async with current_database(settings) as database, running_fleet(settings) as (store, fleet):
        names = [backend.name for backend in settings.backends] if fleet is None else [str(one["name"]) for one in fleet]
        if arguments.backend not in names:
            raise CommandFailed(f"there is no backend {arguments.backend!r}: write one of {', '.join(names)}")
        at_once = await drains.mark(database, store, arguments.backend, drained=drained, by=OPERATOR)
    effect = "at once" if at_once else f"within {drains.READ_EVERY_S:g} s (Redis did not answer)"
    state = "gets no new requests" if drained else "gets requests"
    console.show_facts({"backend": arguments.backend, "state": state, "everywhere": effect}, as_json=arguments.json)
