"""One route of the admin API as an ASGI application: reads the request, calls the handler, answers with JSON."""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from starlette.types import Receive, Scope, Send

from gateway.admin.values import BadValue
from gateway.audit.record import Record
from gateway.auth import key_format
from gateway.auth.key import Key
from gateway.core import strict_json
from gateway.core.asgi import send_json
from gateway.core.cancel_scope import ScopeTimer
from gateway.core.errors import BadRequest, CommandFailed, NameTaken, NotFound, ResourceExists, ResourceNotFound
from gateway.proxy.access import Access
from gateway.proxy.body import Bodies

LONGEST_BODY = 65_536
LONGEST_VALUE, MOST_VALUES = 1000, 50


@dataclass
class AdminRequest:
    """An operator's request, parsed."""

    key: Key
    path: Mapping[str, str]
    query: dict[str, str]
    body: dict[str, Any]
    record: Record

    def note_action(self, action: str) -> None:
        """For the audit."""
        self.record.detail = key_format.redacted(action)[:200]


Handler = Callable[[AdminRequest], Awaitable[Any]]


class AdminRoute:
    """The ASGI application of one handler; `takes` are the parameters that its query or its body may have."""

    def __init__(
        self,
        access: Access,
        scope_timer: ScopeTimer,
        bodies: Bodies,
        handler: Handler,
        *,
        takes: Collection[str] = (),
        has_body: bool = False,
        status: int = 200,
    ) -> None:
        self._access, self._scope_timer, self._bodies, self._handler = access, scope_timer, bodies, handler
        self.takes, self.has_body, self.status = takes, has_body, status

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record: Record = scope["state"]["record"]
        key = await self._access.admit_operator(scope, record)
        body: dict[str, Any] = {}
        if self.has_body:
            with self._scope_timer.call_scope() as cancel_scope:
                body = strict_json.read_object(await self._bodies.read(scope, receive, record, cancel_scope, LONGEST_BODY))
        query, path = _query(scope), scope.get("path_params", {})
        self._refuse_unknown(query if not self.has_body else body)
        _refuse_long({**query, **path, **body})
        request = AdminRequest(key, path, query, body, record)
        await self._respond(scope, send, request, await self._answer(request))

    async def _respond(self, scope: Scope, send: Send, request: AdminRequest, answer: Any) -> None:
        await send_json(send, answer, self.status)

    def _refuse_unknown(self, parameters: Mapping[str, Any]) -> None:
        for name in parameters.keys() - set(self.takes):
            known = f"it takes {', '.join(sorted(self.takes))}" if self.takes else "it takes no parameters"
            raise BadRequest(f"{name[:64]!a} is not a parameter of this route: {known}")

    async def _answer(self, request: AdminRequest) -> Any:
        try:
            return await self._handler(request)
        except NotFound as error:
            raise ResourceNotFound(str(error)) from error
        except NameTaken as error:
            raise ResourceExists(str(error)) from error
        except (CommandFailed, BadValue) as error:
            raise BadRequest(str(error)) from error


def _query(scope: Scope) -> dict[str, str]:
    try:
        return dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=MOST_VALUES))
    except ValueError:
        raise BadRequest(f"the query has more than {MOST_VALUES} parameters") from None


def _refuse_long(parameters: Mapping[str, Any]) -> None:
    """Checked before a text is used; lists have limits of their own."""
    for name, value in parameters.items():
        if isinstance(value, str) and len(value) > LONGEST_VALUE:
            raise BadRequest(f"{name!r} is longer than {LONGEST_VALUE} characters")
