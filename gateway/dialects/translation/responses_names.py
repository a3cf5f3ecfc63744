"""Names of tools in the Responses API, which may have namespaces, and in backends, whose names have few letters."""

import hashlib
import re
from dataclasses import dataclass

from gateway.core.errors import BadRequest
from gateway.dialects.fields import MOST_TOOLS

LONGEST_NAME = 64
NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_-]")
JOINT = "__"
DIGITS = 8


@dataclass(frozen=True, slots=True)
class ClientTool:
    """A tool as the client knows it. `kind` is the type that the client gave it: function, custom, local_shell, …"""

    kind: str
    name: str
    namespace: str = ""


class ToolNames:
    """The tools of a request by the names that the backend is given; unlike letters alone, these names lead back to them."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}
        self._tools: dict[str, ClientTool] = {}

    def has(self, tool: ClientTool) -> bool:
        return (tool.namespace, tool.name) in self._names

    def name_for(self, tool: ClientTool) -> str:
        """The backend's name for a tool, or for one that only the conversation mentions."""
        key = (tool.namespace, tool.name)
        found = self._names.get(key)
        if found is None:
            if len(self._names) >= MOST_TOOLS:
                raise BadRequest(f"the request names more than {MOST_TOOLS} tools")
            found = _plain_name(*key)
            if found in self._tools:
                found = _digested_name(found, *key)
            self._names[key] = found
            self._tools[found] = tool
        return found

    def tool_of(self, name: str) -> ClientTool:
        """The tool that a backend calls by this name; a name that no tool has is passed on."""
        return self._tools.get(name) or ClientTool("function", name)


def _plain_name(namespace: str, name: str) -> str:
    whole = namespace + name if not namespace or namespace.endswith(JOINT) else namespace + JOINT + name
    allowed = NOT_IN_NAMES.sub("_", whole)
    return allowed if allowed == whole and len(whole) <= LONGEST_NAME else _digested_name(allowed, namespace, name)


def _digested_name(allowed: str, namespace: str, name: str) -> str:
    digest = hashlib.sha256(f"{namespace}\0{name}".encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]
    return f"{allowed[: LONGEST_NAME - DIGITS - 1]}_{digest}"
