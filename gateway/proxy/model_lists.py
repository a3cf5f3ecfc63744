"""What clients ask before they chat: models, versions, details; from the catalog, but running models from the backends."""

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.types import Receive, Scope, Send

from gateway.audit.record import Record
from gateway.auth.key import Key
from gateway.core.asgi import send_json
from gateway.core.errors import BadRequest, UnknownRoute
from gateway.dialects.model_entries import context_of
from gateway.dialects.model_names import NAME_RULE, canonical, is_name
from gateway.fleet.catalog import Catalog, Model
from gateway.proxy.access import Access
from gateway.proxy.suggestions import DID_YOU_MEAN
from gateway.proxy.visibility import missing

OLDEST_VERSION_CLIENTS_TAKE = "0.6.4"

AskRunning = Callable[[], Awaitable[Mapping[str, tuple[float, tuple[dict[str, Any], ...]]]]]


class ModelLists:
    """The endpoints of `GET /api/tags`, `/api/ps`, `/api/version`, `/v1/models` and `/v1/models/{id}`."""

    def __init__(self, access: Access, catalog: Callable[[], Catalog], ask_running: AskRunning) -> None:
        self._access, self._catalog, self._ask_running = access, catalog, ask_running

    async def tags(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        await send_json(send, {"models": [model.native for model in self._catalog().listed(key.models)]})

    async def running_models(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        running = await self._ask_running()
        await send_json(send, {"models": self._catalog().running_models(key.models, running)})

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._key(scope)
        await send_json(send, {"version": self._catalog().lowest_version() or OLDEST_VERSION_CLIENTS_TAKE})

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        key = await self._key(scope)
        data = [model.openai for model in self._catalog().listed(key.models)]
        await send_json(send, {"object": "list", "data": data})

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked: str = scope["path_params"]["id"]
        if not asked.strip("/"):
            raise UnknownRoute(DID_YOU_MEAN.format("/v1/models"))
        key = await self._key(scope)
        if not is_name(asked):
            raise BadRequest(f"the model's name in the path {NAME_RULE}")
        found = self._catalog().find(canonical(asked), key.models)
        if found is None or not found.is_listed(time.time()):
            raise missing(asked, key, self._catalog())
        await send_json(send, {**found.openai, "id": asked})

    async def _key(self, scope: Scope) -> Key:
        record: Record = scope["state"]["record"]
        return await self._access.admit_caller(scope, record)


def show_answer(model: Model) -> dict[str, Any]:
    """`POST /api/show` for a model that only OpenAI-compatible servers have: they have no such route.

    Unknown facts are left empty, never invented.
    """
    info: dict[str, Any] = {"general.architecture": "unknown"}
    if length := context_of(model.openai):
        info["unknown.context_length"] = length
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "details": model.native["details"],
        "model_info": info,
        "capabilities": model.native.get("capabilities") or ["completion"],
        "modified_at": model.native["modified_at"],
    }
