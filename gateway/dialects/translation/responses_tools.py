"""Tools of the Responses API as functions for a backend."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.translation.conversation import Tool
from gateway.dialects.translation.dropped_names import drop
from gateway.dialects.translation.responses_names import ClientTool, ToolNames

# The one parameter of a function that stands for a tool with free text.
INPUT = "input"
TEXT = {"type": "string"}
TEXTS = {"type": "array", "items": TEXT}
NUMBER = {"type": "integer"}
FREE_TEXT = "Call it with a JSON object whose only field, 'input', is that text as a string, complete and not wrapped further."


@dataclass(frozen=True, slots=True)
class Native:
    """A tool that clients run themselves and whose calls have a type of their own.

    A call is an item of the type `item`, whose `field` has the arguments of the call; `fixed` are other fields of the item.
    `arguments` returns what the field has for the arguments of a model, or None if the client could not run that.
    """

    item: str
    field: str
    description: str
    properties: Mapping[str, Any]
    required: tuple[str, ...]
    arguments: Callable[[dict[str, Any]], dict[str, Any] | None]
    fixed: tuple[tuple[str, str], ...] = ()

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "properties": dict(self.properties), "required": list(self.required)}

    def known(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {name: arguments[name] for name in self.properties if arguments.get(name) is not None}


def _of_local_shell(arguments: dict[str, Any]) -> dict[str, Any] | None:
    command = arguments.get("command")
    if isinstance(command, str) and command:
        command = ["bash", "-lc", command]
    if not _are_texts(command):
        return None
    return {"type": "exec", "env": {}, **NATIVE["local_shell"].known(arguments), "command": command}


def _of_shell(arguments: dict[str, Any]) -> dict[str, Any] | None:
    return NATIVE["shell"].known(arguments) if _are_texts(arguments.get("commands")) else None


def _of_apply_patch(arguments: dict[str, Any]) -> dict[str, Any] | None:
    kind, needed = arguments.get("type"), ["path"] if arguments.get("type") == "delete_file" else ["path", "diff"]
    if kind not in PATCHES or not all(isinstance(arguments.get(name), str) for name in needed):
        return None
    return {"type": kind, **{name: arguments[name] for name in needed}}


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


PATCHES = ("create_file", "update_file", "delete_file")
NATIVE = {
    "local_shell": Native(
        "local_shell_call",
        "action",
        "Runs a command on the user's computer and returns its output. The command is a list: the program and its arguments.",
        {"command": TEXTS, "timeout_ms": NUMBER, "working_directory": TEXT},
        ("command",),
        _of_local_shell,
    ),
    "shell": Native(
        "shell_call",
        "action",
        "Runs shell commands on the user's computer and returns their output.",
        {"commands": TEXTS, "timeout_ms": NUMBER, "max_output_length": NUMBER},
        ("commands",),
        _of_shell,
    ),
    "apply_patch": Native(
        "apply_patch_call",
        "operation",
        "Creates, updates or deletes one file. The diff is in the V4A format; it is left out to delete a file.",
        {"type": {"type": "string", "enum": list(PATCHES)}, "path": TEXT, "diff": TEXT},
        ("type", "path"),
        _of_apply_patch,
    ),
    "tool_search": Native(
        "tool_search_call",
        "arguments",
        "Searches for more tools. Those that are found can be called afterwards.",
        {"query": TEXT},
        (),
        dict,
        (("execution", "client"),),
    ),
}
NATIVE_ITEMS = {native.item: kind for kind, native in NATIVE.items()}


def read_tools(tools: Any, names: ToolNames, dropped: list[str], where: str = "tools") -> list[Tool]:
    """The tools that a backend can be given; the others are named in `dropped`."""
    if not isinstance(tools, list | None) or not all(isinstance(tool, dict) for tool in tools or ()):
        raise BadRequest(f"the field {where!r} must be a list of objects")
    return list(_read(tools or [], "", names, dropped, where))


def _read(tools: list[dict[str, Any]], namespace: str, names: ToolNames, dropped: list[str], where: str) -> Iterator[Tool]:
    for tool in tools:
        kind = tool.get("type", "function")
        if kind == "namespace" and not namespace:
            inner = tool.get("tools")
            if not isinstance(inner, list) or not all(isinstance(one, dict) for one in inner):
                raise BadRequest(f"the 'tools' of a namespace in {where!r} must be a list of objects")
            yield from _read(inner, _name_of(tool, where), names, dropped, where)
        elif kind == "function":
            yield from _function(tool, namespace, names, where)
        elif kind == "custom":
            yield from _custom(tool, namespace, names, where)
        elif isinstance(kind, str) and kind in NATIVE and _is_run_by_client(tool):
            yield from _native(tool, kind, names)
        else:
            drop(f"{where}.{kind}", dropped)


def _name_of(tool: dict[str, Any], where: str) -> str:
    name = tool.get("name")
    if not isinstance(name, str) or not name:
        raise BadRequest(f"each of {where!r} must have a 'name'")
    return name


def is_of_client(tool: dict[str, Any]) -> bool:
    """Whether the client runs a tool itself."""
    kind = tool.get("type", "function")
    return kind in ("function", "custom", "namespace") or (isinstance(kind, str) and kind in NATIVE and _is_run_by_client(tool))


def _is_run_by_client(tool: dict[str, Any]) -> bool:
    environment = tool.get("environment") or {}
    if tool["type"] == "tool_search":
        return tool.get("execution") == "client"
    return isinstance(environment, dict) and environment.get("type", "local") == "local"


def _function(tool: dict[str, Any], namespace: str, names: ToolNames, where: str) -> Iterator[Tool]:
    # Some clients nest the function as chat/completions does.
    found = tool["function"] if isinstance(tool.get("function"), dict) else tool
    known = ClientTool("function", _name_of(found, where), namespace)
    schema, strict = found.get("parameters"), found.get("strict")
    if not isinstance(schema, dict | None):
        raise BadRequest(f"the 'parameters' of each of {where!r} must be an object")
    if not names.has(known):
        strict = strict if isinstance(strict, bool) else None
        yield Tool(names.name_for(known), _description(found), schema or {}, strict)


def _custom(tool: dict[str, Any], namespace: str, names: ToolNames, where: str) -> Iterator[Tool]:
    known = ClientTool("custom", _name_of(tool, where), namespace)
    if not names.has(known):
        texts = [_description(tool), _grammar(tool.get("format")), FREE_TEXT]
        schema = {"type": "object", "properties": {INPUT: TEXT}, "required": [INPUT], "additionalProperties": False}
        yield Tool(names.name_for(known), "\n\n".join(filter(None, texts)), schema)


def _grammar(form: Any) -> str:
    """No backend takes a grammar for the arguments of a function, so the model is asked to keep to it."""
    if not isinstance(form, dict) or form.get("type") != "grammar" or not isinstance(form.get("definition"), str):
        return ""
    return f"The text must match this grammar ({form.get('syntax', 'lark')}):\n{form['definition']}"


def _native(tool: dict[str, Any], kind: str, names: ToolNames) -> Iterator[Tool]:
    known, native = ClientTool(kind, kind), NATIVE[kind]
    if not names.has(known):
        schema = tool.get("parameters")
        own = schema if isinstance(schema, dict) and kind == "tool_search" else native.schema()
        yield Tool(names.name_for(known), _description(tool) or native.description, own)


def _description(tool: dict[str, Any]) -> str:
    found = tool.get("description")
    return found if isinstance(found, str) else ""


def read_choice(choice: Any, tools: list[Tool], names: ToolNames) -> tuple[str | tuple[str], list[Tool]]:
    """The choice of tools, and the tools that may be called at all."""
    if choice is None or choice in ("auto", "none"):
        return (choice or "") if tools else "", tools
    if choice == "required":
        if not tools:
            raise BadRequest("the field 'tool_choice' is 'required', but 'tools' has none that a backend can be given")
        return choice, tools
    if not isinstance(choice, dict):
        raise BadRequest("the field 'tool_choice' must be 'auto', 'none', 'required' or an object")
    if choice.get("type") != "allowed_tools":
        return (_chosen(choice, tools, names),), tools
    allowed = _allowed(choice, tools, names)
    return read_choice(choice.get("mode", "auto"), [tool for tool in tools if tool.name in allowed], names)


def _chosen(choice: dict[str, Any], tools: list[Tool], names: ToolNames) -> str:
    kind, inner = choice.get("type"), choice.get("function")
    named = inner if isinstance(inner, dict) else choice
    name, namespace = (kind if kind in NATIVE_KINDS else named.get("name")), named.get("namespace") or ""
    if kind in TOOL_KINDS and isinstance(name, str) and isinstance(namespace, str):
        known = ClientTool(str(kind), name, namespace)
        if names.has(known) and any(tool.name == names.name_for(known) for tool in tools):
            return names.name_for(known)
    raise BadRequest("the field 'tool_choice' names a tool that 'tools' does not have, or that no backend can be given")


NATIVE_KINDS = tuple(NATIVE)
TOOL_KINDS = ("function", "custom", *NATIVE_KINDS)


def _allowed(choice: dict[str, Any], tools: list[Tool], names: ToolNames) -> set[str]:
    """Tools that only OpenAI runs may be allowed; they are not there."""
    allowed = choice.get("tools")
    if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
        raise BadRequest("the 'tools' of the field 'tool_choice' must be a list of objects")
    return {_chosen(tool, tools, names) for tool in allowed if tool.get("type") in TOOL_KINDS}


def json_text(value: Any) -> str:
    return strict_json.write_with_replacements(value).decode("utf-8", "replace")
