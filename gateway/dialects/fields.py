"""The fields of a client's request: read, checked and bounded."""

from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.model_names import NAME_RULE, is_name

MOST_TOOLS = 4096


def model_of(body: dict[str, Any]) -> str:
    """The field `model`, or Ollama's deprecated `name`. Raises BadRequest if both are there and differ."""
    asked = body.get("model")
    if asked is None or asked == "":
        asked = body.get("name")
    elif "name" in body and body["name"] not in (None, "", asked):
        raise BadRequest("the fields 'model' and 'name' differ; send 'model' alone")
    if asked is None or asked == "":
        raise BadRequest("the field 'model' is missing")
    if not is_name(asked):
        raise BadRequest(f"the field 'model' {NAME_RULE}")
    return str(asked)


def boolean(body: dict[str, Any], name: str, *, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise BadRequest(f"the field {name!r} must be true or false")
    return value


def expect(body: dict[str, Any], name: str, kinds: type | tuple[type, ...], words: str) -> None:
    value = body.get(name)
    if value is None:
        return
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        raise BadRequest(f"the field {name!r} must be {words}")


def expect_number(body: dict[str, Any], names: frozenset[str]) -> None:
    for name in body.keys() & names:
        expect(body, name, (int, float), "a number")


def expect_objects(body: dict[str, Any], name: str) -> None:
    expect(body, name, list, "a list")
    for item in body.get(name) or ():
        if not isinstance(item, dict):
            raise BadRequest(f"the field {name!r} must be a list of objects")


def expect_few_tools(body: dict[str, Any]) -> None:
    """Bounds the tools, because each is examined for each backend. Agents send some hundreds."""
    expect_objects(body, "tools")
    if len(body.get("tools") or ()) > MOST_TOOLS:
        raise BadRequest(f"the field 'tools' must be a list of at most {MOST_TOOLS} objects")


def expect_messages(body: dict[str, Any]) -> None:
    """Backends answer 500 to a role that is not a string, and to tool calls without a function."""
    expect_objects(body, "messages")
    for message in body.get("messages") or ():
        if "role" in message and message["role"].__class__ is not str:
            raise BadRequest("the 'role' of each of 'messages' must be a string")
        if "tool_calls" in message and message["tool_calls"] is not None:
            _expect_tool_calls(message)


def _expect_tool_calls(message: dict[str, Any]) -> None:
    expect_objects(message, "tool_calls")
    for call in message["tool_calls"]:
        if call.get("type", "function") == "function" and not isinstance(call.get("function"), dict):
            raise BadRequest("each of the 'tool_calls' of a message must be an object with a 'function'")


def expect_tools(body: dict[str, Any]) -> None:
    """Backends answer 500 to a function without a name."""
    if body.get("tools") is None:
        return
    expect_objects(body, "tools")
    for tool in body["tools"]:
        function = tool.get("function")
        named = isinstance(function, dict) and isinstance(function.get("name"), str) and function["name"]
        if tool.get("type", "function") == "function" and not named:
            raise BadRequest("each of 'tools' must be an object with a 'function' that has a 'name'")


def bounded(value: object, cap: int) -> int:
    """A requested limit of output tokens as a number from 1 to `cap`; anything else means `cap`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= cap:
        return int(value)
    return cap


def is_over(value: object, cap: int) -> bool:
    """Whether `bounded` reduces the requested limit: more than `cap`, or no limit at all."""
    return value is not None and not (isinstance(value, int | float) and 1 <= value <= cap)


def wish(value: object) -> int | None:
    """The limit of output tokens that a caller requested, or None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and value >= 1 else None  # type: ignore[call-overload,operator]


def text_of(message: dict[str, Any], *names: str) -> str:
    """The text of a message or of a part of one, with its tool calls."""
    texts = [message[name] for name in names if isinstance(message.get(name), str)]
    calls = message.get("tool_calls")
    return "".join(texts) + (strict_json.write_with_replacements(calls).decode("utf-8", "replace") if calls else "")
