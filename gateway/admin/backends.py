"""`/admin/v1/backends` and `/admin/v1/refresh`: list, drain and probe backends, and poll all of them for their models."""

from collections.abc import Mapping
from typing import Any

from gateway.admin.endpoint import AdminRequest
from gateway.admin.overview import Overview
from gateway.core.errors import ResourceNotFound
from gateway.fleet import drains
from gateway.fleet import probe as fleet_probe
from gateway.fleet.backends.backend import Backend
from gateway.fleet.discovery import Discovery
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient


class BackendHandlers:
    def __init__(
        self,
        overview: Overview,
        backends: Mapping[str, Backend],
        discovery: Discovery,
        database: Database,
        store: RedisClient,
    ) -> None:
        self._overview, self._backends, self._discovery = overview, backends, discovery
        self._database, self._store = database, store

    async def list_all(self, request: AdminRequest) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self._overview.now())["backends"]
        return found

    async def drain(self, request: AdminRequest) -> dict[str, Any]:
        return await self._mark(request, drained=True)

    async def undrain(self, request: AdminRequest) -> dict[str, Any]:
        return await self._mark(request, drained=False)

    async def _mark(self, request: AdminRequest, *, drained: bool) -> dict[str, Any]:
        name = self._backend(request).name
        request.note_action(f"{'drain' if drained else 'undrain'} {name}")
        at_once = await drains.mark(self._database, self._store, name, drained=drained, by=request.key.id)
        return {"backend": name, "drained": drained, "everywhere_at_once": at_once}

    async def probe(self, request: AdminRequest) -> dict[str, Any]:
        backend = self._backend(request)
        request.note_action(f"probe {backend.name}")
        return await fleet_probe.probe(backend)

    def _backend(self, request: AdminRequest) -> Backend:
        backend = self._backends.get(request.path["name"])
        if backend is None:
            raise ResourceNotFound(f"there is no backend {request.path['name'][:64]!a}")
        return backend

    async def refresh(self, request: AdminRequest) -> dict[str, Any]:
        request.note_action("refresh")
        await self._discovery.refresh()
        catalog = self._discovery.catalog
        rows = [{"backend": found.backend, "models": len(found.models), "error": found.error} for found in catalog.snapshots]
        return {"models": catalog.size, "backends": rows}
