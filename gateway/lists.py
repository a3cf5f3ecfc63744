"""What clients ask before they chat: models, versions, details. Answered from the map, never waiting for a backend."""

import time
from collections.abc import Callable

from starlette.types import Receive, Scope, Send

from gateway.access import Access
from gateway.catalog import Catalog
from gateway.errors import BadRequest, ModelNotAvailable
from gateway.json_reply import send_json
from gateway.keys import Key
from gateway.model_names import NAME_RULE, canonical, is_name
from gateway.record import Record

OLDEST_VERSION_CLIENTS_TAKE = "0.6.4"


class Lists:
    """The endpoints of `GET /api/tags`, `/api/ps`, `/api/version`, `/v1/models` and `/v1/models/{id}`."""

    def __init__(self, access: Access, catalog: Callable[[], Catalog]) -> None:
        self._access, self._catalog = access, catalog

    async def tags(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        await send_json(send, {"models": [model.native for model in self._catalog().listed(key.models)]})

    async def running(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        await send_json(send, {"models": self._catalog().running(key.models)})

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._key(scope)
        await send_json(send, {"version": self._catalog().lowest_version() or OLDEST_VERSION_CLIENTS_TAKE})

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        data = [model.openai for model in self._catalog().listed(key.models)]
        await send_json(send, {"object": "list", "data": data})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        asked: str = scope["path_params"]["id"]
        if not is_name(asked):
            raise BadRequest(f"the model's name in the path {NAME_RULE}")
        found = self._catalog().find(canonical(asked), key.models)
        if found is None or not found.is_listed(time.time()):
            raise ModelNotAvailable
        await send_json(send, {**found.openai, "id": asked})

    async def _key(self, scope: Scope) -> Key:
        record: Record = scope["state"]["record"]
        return await self._access.visitor(scope, record)
