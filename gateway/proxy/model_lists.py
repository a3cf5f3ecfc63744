"""What clients ask before they chat: models, versions, details; from the catalog, but running models from the backends.

`/v1/models` has the form of the client that asks: OpenAI's, with one more field for Codex, or Anthropic's.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from gateway.audit.record import Record
from gateway.auth.key import Key
from gateway.core.asgi import send_json
from gateway.core.errors import BadRequest, UnknownRoute
from gateway.dialects.anthropic import Anthropic
from gateway.dialects.model_entries import context_of
from gateway.dialects.model_names import NAME_RULE, canonical, is_name
from gateway.dialects.translation.messages_models import model_info, models_page
from gateway.dialects.translation.responses_models import codex_models
from gateway.fleet.catalog import Catalog, Model
from gateway.proxy.access import Access
from gateway.proxy.suggestions import DID_YOU_MEAN
from gateway.proxy.visibility import missing

OLDEST_VERSION_CLIENTS_TAKE = "0.6.4"
MOST_PARAMETERS = 50

AskRunning = Callable[[], Awaitable[Mapping[str, tuple[dict[str, Any], ...]]]]


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
        listed = self._catalog().listed(key.models)
        data, query = [model.openai for model in listed], _query(scope)
        if _is_anthropic(scope):
            await send_json(send, models_page(data, query))
            return
        more = {"models": _for_codex(listed)} if _is_from_codex(scope, query) else {}
        await send_json(send, {"object": "list", "data": data, **more})

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
        entry = {**found.openai, "id": asked}
        if _is_anthropic(scope):
            await send_json(send, model_info(entry))
            return
        await send_json(send, entry)

    async def _key(self, scope: Scope) -> Key:
        record: Record = scope["state"]["record"]
        return await self._access.admit_caller(scope, record)


def _is_anthropic(scope: Scope) -> bool:
    record: Record = scope["state"]["record"]
    return record.dialect == Anthropic.name


def _is_from_codex(scope: Scope, query: Mapping[str, str]) -> bool:
    agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
    return "client_version" in query or agent.lower().startswith(b"codex")


def _for_codex(listed: Iterable[Model]) -> list[dict[str, Any]]:
    """Without models that cannot chat, as far as that is known."""
    able = {str(model.openai["id"]): model for model in listed if "completion" in _capabilities(model)}
    contexts = {name: context_of(model.openai) for name, model in able.items()}
    return codex_models(able, contexts, {name for name, model in able.items() if "vision" in _capabilities(model)})


def _capabilities(model: Model) -> list[str]:
    found = model.native.get("capabilities")
    return found if isinstance(found, list) and found else ["completion"]


def _query(scope: Scope) -> dict[str, str]:
    try:
        return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_PARAMETERS))
    except ValueError:
        raise BadRequest(f"the query has more than {MOST_PARAMETERS} parameters") from None
