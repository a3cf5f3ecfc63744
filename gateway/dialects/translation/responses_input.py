"""The items of a request of the Responses API as a conversation whose every tool call is followed by its result."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gateway.core.errors import BadRequest
from gateway.dialects.translation.conversation import Image, Message, Part, Role, Text, Thinking, Tool, ToolCall, ToolResult
from gateway.dialects.translation.dropped_names import drop
from gateway.dialects.translation.responses_content import read_content, read_text
from gateway.dialects.translation.responses_names import ClientTool, ToolNames
from gateway.dialects.translation.responses_tools import INPUT, NATIVE, NATIVE_ITEMS, json_text, read_tools

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# A template that finds a call without a result fails, and so does one that finds a result without a call.
UNANSWERED = "There is no output: the call was interrupted."
EARLIER_OUTPUT = "The output of an earlier call of a tool"
KEPT_ELSEWHERE = {
    "item_reference": "this gateway keeps no items; send the item itself",
    "compaction": "only the server that wrote it can read it; send the conversation itself",
    "compaction_summary": "only the server that wrote it can read it; send the conversation itself",
    "context_compaction": "only the server that wrote it can read it; send the conversation itself",
    "compaction_trigger": "this gateway does not shorten conversations; send a shorter one",
}


@dataclass(slots=True)
class _Turn:
    role: Role
    parts: list[Part] = field(default_factory=list)
    # Calls that have no result yet, and the results in the order of the client.
    waiting: list[str] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)


def read_input(instructions: Any, given: Any, tools: list[Tool], names: ToolNames, dropped: list[str]) -> list[Message]:
    """The conversation; tools that its items bring along are added to `tools`."""
    reader = _Reader(tools, names, dropped)
    if not isinstance(instructions, str | None):
        raise BadRequest("the field 'instructions' must be a string")
    if instructions:
        reader.add("system", [Text(instructions)])
    if given is None:
        raise BadRequest("the field 'input' is missing")
    if isinstance(given, str):
        reader.add("user", [Text(given)])
    elif isinstance(given, list):
        for number, item in enumerate(given):
            reader.read(item, f"'input[{number}]'")
    else:
        raise BadRequest("the field 'input' must be a string or a list of items")
    found = [message for turn in reader.turns for message in _messages(turn)]
    if not found:
        raise BadRequest("the field 'input' is empty")
    return found


def _messages(turn: _Turn) -> Iterator[Message]:
    yield Message(turn.role, tuple(turn.parts))
    missing = [ToolResult(call_id, (Text(UNANSWERED),), is_error=True) for call_id in turn.waiting]
    if turn.results or missing:
        yield Message("user", (*turn.results, *missing))


class _Reader:
    def __init__(self, tools: list[Tool], names: ToolNames, dropped: list[str]) -> None:
        self.turns: list[_Turn] = []
        self._tools, self._names, self._dropped = tools, names, dropped
        self._readers: dict[str, Callable[[dict[str, Any], str], None]] = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._function_call,
            "custom_tool_call": self._custom_call,
            **dict.fromkeys(NATIVE_ITEMS, self._native_call),
            **{f"{item}_output": self._output for item in ("function_call", "custom_tool_call", *NATIVE_ITEMS)},
            "tool_search_output": self._found_tools,
            "additional_tools": self._more_tools,
        }

    def add(self, role: Role, parts: list[Part]) -> _Turn:
        """Texts, thoughts and calls of an assistant are one turn until something else follows."""
        last = self.turns[-1] if self.turns else None
        if last is None or role != "assistant" or last.role != role or last.results:
            last = _Turn(role)
            self.turns.append(last)
        last.parts += parts
        return last

    def read(self, item: Any, where: str) -> None:
        if not isinstance(item, dict):
            raise BadRequest(f"{where} must be an object")
        kind = item.get("type") or ("message" if "role" in item else None)
        if not isinstance(kind, str):
            raise BadRequest(f"{where} must have a 'type'")
        if kind in KEPT_ELSEWHERE:
            raise BadRequest(f"{where} is of the type {kind!r}: {KEPT_ELSEWHERE[kind]}")
        reader = self._readers.get(kind)
        if reader is None:
            drop(f"input.{kind}", self._dropped)
        else:
            reader(item, where)

    def _message(self, item: dict[str, Any], where: str) -> None:
        given = item.get("role")
        role = ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise BadRequest(f"the 'role' of {where} must be one of {', '.join(ROLES)}")
        content, where = item.get("content"), f"the 'content' of {where}"
        parts = read_content(content, where) if role == "user" else read_text(content, where)
        if parts:
            self.add(role, list(parts))

    def _reasoning(self, item: dict[str, Any], where: str) -> None:
        """The summary repeats the content, if there is both."""
        texts = read_text(item.get("content"), f"the 'content' of {where}")
        texts = texts or read_text(item.get("summary"), f"the 'summary' of {where}")
        thoughts: list[Part] = [Thinking(text.text) for text in texts if text.text]
        if thoughts:
            self.add("assistant", thoughts)

    def _function_call(self, item: dict[str, Any], where: str) -> None:
        arguments = item.get("arguments")
        if isinstance(arguments, dict):
            arguments = json_text(arguments)
        if not isinstance(arguments, str | None):
            raise BadRequest(f"the 'arguments' of {where} must be a string")
        self._call(item, self._tool("function", item, where), arguments or "", where)

    def _custom_call(self, item: dict[str, Any], where: str) -> None:
        if not isinstance(item.get("input"), str):
            raise BadRequest(f"the 'input' of {where} must be a string")
        self._call(item, self._tool("custom", item, where), json_text({INPUT: item["input"]}), where)

    def _native_call(self, item: dict[str, Any], where: str) -> None:
        kind = NATIVE_ITEMS[item["type"]]
        native = NATIVE[kind]
        arguments = item.get(native.field)
        if not isinstance(arguments, dict):
            raise BadRequest(f"the {native.field!r} of {where} must be an object")
        known = arguments if kind == "tool_search" else native.known(arguments)
        self._call(item, ClientTool(kind, kind), json_text(known), where)

    def _tool(self, kind: str, item: dict[str, Any], where: str) -> ClientTool:
        name, namespace = item.get("name"), item.get("namespace") or ""
        if not isinstance(name, str) or not name or not isinstance(namespace, str):
            raise BadRequest(f"the 'name' of {where} must be a string")
        return ClientTool(kind, name, namespace)

    def _call(self, item: dict[str, Any], tool: ClientTool, arguments: str, where: str) -> None:
        call_id = _id_of(item, where)
        self.add("assistant", [ToolCall(call_id, self._names.name_for(tool), arguments)]).waiting.append(call_id)

    def _output(self, item: dict[str, Any], where: str) -> None:
        output, where_output = item.get("output"), f"the 'output' of {where}"
        if item["type"] == "shell_call_output" or isinstance(output, dict):
            content: tuple[Text | Image, ...] = (Text(json_text(output)),)
        else:
            content = read_content(output, where_output) or (Text(""),)
        failed = item.get("status") == "failed"
        self._result(item, content, failed=failed)

    def _found_tools(self, item: dict[str, Any], where: str) -> None:
        found = read_tools(item.get("tools"), self._names, self._dropped, f"input.{item['type']}.tools")
        self._tools += found
        names = ", ".join(tool.name for tool in found) or "none that are new"
        self._result(item, (Text(f"These tools can be called now: {names}"),))

    def _more_tools(self, item: dict[str, Any], where: str) -> None:
        self._tools += read_tools(item.get("tools"), self._names, self._dropped, f"input.{item['type']}.tools")

    def _result(self, item: dict[str, Any], content: tuple[Text | Image, ...], *, failed: bool = False) -> None:
        """Puts the result behind the latest call with its id that has none, even if something came in between."""
        call_id = item.get("call_id") or item.get("id")
        for turn in reversed(self.turns):
            if call_id in turn.waiting:
                turn.waiting.remove(call_id)
                turn.results.append(ToolResult(str(call_id), content, is_error=failed))
                return
        name = item.get("name")
        of_tool = f" {name}" if isinstance(name, str) and name else ""
        self.add("user", [Text(f"{EARLIER_OUTPUT}{of_tool}:"), *content])


def _id_of(item: dict[str, Any], where: str) -> str:
    call_id = item.get("call_id") or item.get("id")
    if not isinstance(call_id, str) or not call_id:
        raise BadRequest(f"the 'call_id' of {where} must be a string")
    return call_id
