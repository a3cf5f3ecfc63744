"""Tool calls of one answer, put together from deltas. No I/O.

By the rule the first delta of a call has its index, id and name, and later ones the index and more of the arguments. Servers
differ: Ollama gives all calls of a stream the index 0, SGLang repeats the id in each delta, others send no index or no id, or
repeat the name. A delta that fits two calls is refused, as arguments of one call must not end up in another.
"""

import secrets
from dataclasses import dataclass, field

from gateway.core import strict_json
from gateway.dialects.translation.conversation import ToolPiece
from gateway.dialects.translation.tool_arguments import ArgumentPieces
from gateway.dialects.translation.unreadable import Unreadable

MOST_CALLS = 1000


@dataclass(slots=True)
class Delta:
    index: int | None
    id: str
    name: str
    arguments: str

    @property
    def is_anonymous(self) -> bool:
        return self.index is None and not self.id and not self.name


@dataclass(slots=True, eq=False)
class StartedCall:
    """`given_id` is the backend's id; `number` is the index of the call for the client, once its beginning was sent."""

    has_index: bool
    given_id: str = ""
    name: str = ""
    arguments: ArgumentPieces = field(default_factory=ArgumentPieces)
    number: int = -1


class ToolCalls:
    def __init__(self) -> None:
        self._calls: list[StartedCall] = []
        self._by_index: dict[int, StartedCall] = {}
        self._by_id: dict[str, StartedCall] = {}
        self._ids: set[str] = set()
        self.count = 0

    def read(self, deltas: object) -> list[ToolPiece]:
        """The pieces in the `tool_calls` of a delta."""
        read = _read_deltas(deltas)
        if sum(delta.is_anonymous for delta in read) > 1:
            raise Unreadable("pieces of several tool calls cannot be told apart")
        return [piece for delta in read for piece in self._add(self._call_of(delta), delta)]

    def read_whole(self, calls: object) -> list[ToolPiece]:
        """The `tool_calls` of a whole message: each is a call of its own."""
        return [piece for delta in _read_deltas(calls) for piece in self._add(self._new(delta), delta)]

    def end(self) -> None:
        """Raises Unreadable if a call never got a name."""
        if self.count < len(self._calls):
            raise Unreadable("a tool call has no name")

    def _call_of(self, delta: Delta) -> StartedCall:
        call = self._find(delta)
        return self._new(delta) if call is None or _begins_another(call, delta) else call

    def _find(self, delta: Delta) -> StartedCall | None:
        """The call that a delta belongs to by its index or id, or else the last one; None if it is the first of its call."""
        last = self._calls[-1] if self._calls else None
        by_id = self._by_id.get(delta.id)
        if delta.index is None:
            return by_id if delta.id else last
        at_index = self._by_index.get(delta.index)
        if at_index is None:
            before = by_id or last
            return None if delta.name or before is None or before.has_index else before
        if not delta.name:
            return by_id or at_index
        if not delta.id or not at_index.given_id or delta.id == at_index.given_id:
            return at_index
        if at_index.arguments.has_any and not at_index.arguments.is_object:
            raise Unreadable("a tool call begins before the arguments of another are complete")
        return None

    def _new(self, delta: Delta) -> StartedCall:
        if len(self._calls) >= MOST_CALLS:
            raise Unreadable(f"the answer has more than {MOST_CALLS} tool calls")
        if delta.is_anonymous:
            raise Unreadable("a piece of a tool call belongs to no call")
        call = StartedCall(has_index=delta.index is not None)
        self._calls.append(call)
        if delta.index is not None:
            self._by_index[delta.index] = call
        return call

    def _add(self, call: StartedCall, delta: Delta) -> list[ToolPiece]:
        call.name = call.name or delta.name
        if delta.id and not call.given_id:
            call.given_id = delta.id
            self._by_id[delta.id] = call
        if delta.arguments:
            call.arguments.add(delta.arguments)
        if call.number >= 0:
            return [ToolPiece(call.number, arguments=delta.arguments)] if delta.arguments else []
        if not call.name:
            return []
        call.number = self.count
        self.count += 1
        return [ToolPiece(call.number, self._unique_id(call.given_id), call.name, call.arguments.text)]

    def _unique_id(self, given: str) -> str:
        """The backend's id, or one of our own if there is none or another call of this answer has it."""
        found = given if given and given not in self._ids else f"call_{secrets.token_hex(12)}"
        self._ids.add(found)
        return found


def _begins_another(call: StartedCall, delta: Delta) -> bool:
    """Whether a delta with a name is not one more of the call that its index or id points to."""
    if not delta.name or not call.name:
        return False
    is_renamed = delta.name != call.name
    if (is_renamed or delta.arguments.lstrip().startswith("{")) and call.arguments.is_object:
        return True
    if not is_renamed:
        return False
    if delta.index is None and not delta.id and not call.arguments.has_any:
        return True
    raise Unreadable("a tool call changes its name")


def _read_deltas(deltas: object) -> list[Delta]:
    if deltas is None:
        return []
    if not isinstance(deltas, list):
        raise Unreadable("the tool calls are not a list")
    if len(deltas) > MOST_CALLS:
        raise Unreadable(f"a chunk has more than {MOST_CALLS} pieces of tool calls")
    return [_read_delta(delta) for delta in deltas]


def _read_delta(delta: object) -> Delta:
    function = delta.get("function") if isinstance(delta, dict) else None
    if not isinstance(delta, dict) or not isinstance(function, dict | None):
        raise Unreadable("a tool call is not an object with a function")
    if delta.get("type") not in (None, "", "function"):
        raise Unreadable("a tool call is not of a function")
    function = function or {}
    return Delta(
        _index(delta.get("index")), _id(delta.get("id")), _name(function.get("name")), _arguments(function.get("arguments"))
    )


def _index(value: object) -> int | None:
    if value is not None and value.__class__ is not int:
        raise Unreadable("the index of a tool call is not a whole number")
    return value


def _id(value: object) -> str:
    """Some servers number their calls."""
    if value.__class__ is int:
        return str(value)
    if not isinstance(value, str | None):
        raise Unreadable("the id of a tool call is not a string")
    return value or ""


def _name(value: object) -> str:
    if not isinstance(value, str | None):
        raise Unreadable("the name of a tool call is not a string")
    return value or ""


def _arguments(value: object) -> str:
    """The text as the backend sent it; some send an object."""
    if isinstance(value, dict):
        return strict_json.write_with_replacements(value).decode("utf-8", "replace")
    if not isinstance(value, str | None):
        raise Unreadable("the arguments of a tool call are not a string")
    return value or ""
