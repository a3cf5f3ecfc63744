"""Requests of OpenAI's Responses API for a backend that has this API itself.

Only fields that a model server has reach it: llama.cpp reads all others as those of chat/completions, so that one of them could
lift the limit of output tokens. Tools that a server runs itself do not reach it: Ollama searches the web with the account of
its operator, and vLLM calls other hosts.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gateway.dialects.dialect import Kind
from gateway.dialects.translation.dropped_names import drop
from gateway.dialects.translation.responses_request import NOTHING, refuse_state
from gateway.dialects.translation.responses_tools import is_of_client

PASSED = frozenset(
    "model instructions input max_output_tokens stream temperature top_p top_k min_p seed presence_penalty frequency_penalty "
    "repeat_penalty repetition_penalty tools tool_choice parallel_tool_calls reasoning text store user metadata "
    "chat_template_kwargs".split()
)
# llama.cpp answers 400 to any other item or part, and Ollama to most of them.
PARTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "user": frozenset({"input_text", "input_image"}),
        "system": frozenset({"input_text"}),
        "developer": frozenset({"input_text"}),
        "assistant": frozenset({"output_text", "input_text"}),
    }
)
OUTPUTS, THOUGHTS = frozenset({"input_text"}), frozenset({"reasoning_text"})
EFFORTS: Mapping[Kind, tuple[str | None, ...]] = MappingProxyType(
    {"openai": (None, "low", "medium", "high"), "ollama": (None,)}
)


def without_unsupported(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The body for such a backend, with what stays in its order, and the names of what was taken out.

    The answer is never kept. Raises BadRequest on what needs one that was.
    """
    refuse_state(body)
    dropped: list[str] = []
    kept = {name: value for name, value in body.items() if name in PASSED}
    for name, value in body.items():
        if value and value not in NOTHING and (name not in PASSED or name == "store"):
            drop(name, dropped)
    if isinstance(body.get("tools"), list):
        kept["tools"] = [tool for tool in body["tools"] if _is_kept(tool, dropped)]
        if not kept["tools"]:
            del kept["tools"]
    kept["store"] = False
    return kept, dropped


def _is_kept(tool: Any, dropped: list[str]) -> bool:
    """Whether the client runs a tool. Ollama reads names in any case."""
    if not isinstance(tool, dict):
        return True
    is_unclear = any(name != "type" and name.casefold() == "type" for name in tool)
    if is_of_client(tool) and not is_unclear:
        return True
    drop("tools.type" if is_unclear else f"tools.{tool.get('type')}", dropped)
    return False


def passes_unchanged(body: dict[str, Any], kind: Kind = "openai") -> bool:
    """Whether every server with this API does what `body` asks for; else the request is better translated.

    `body` is what `without_unsupported` returns. Servers refuse tools and items that chat/completions does not have, or take
    such tools for functions without parameters. They leave out, without a word: a format (llama.cpp, and Ollama if it has no
    schema), a choice of tools (Ollama). Some efforts are a 400 of vLLM's, and any is
    one of Ollama's for a model that does not think.
    """
    text, reasoning = (body.get(name) or {} for name in ("text", "reasoning"))
    if not isinstance(text, dict) or not isinstance(reasoning, dict):
        return False
    if text.get("format") not in (None, {"type": "text"}) or reasoning.get("effort") not in EFFORTS[kind]:
        return False
    if body.get("tool_choice") not in (None, "auto"):
        return False
    return _are_functions(body.get("tools") or []) and _are_plain(body.get("input"))


def _are_functions(tools: Any) -> bool:
    """Flat functions; some clients nest them as chat/completions does, which no server reads here."""
    if not isinstance(tools, list):
        return False
    return all(
        isinstance(tool, dict) and tool.get("type") == "function" and isinstance(tool.get("name"), str) for tool in tools
    )


def _are_plain(given: Any) -> bool:
    if isinstance(given, str):
        return bool(given)
    return isinstance(given, list) and bool(given) and all(_is_plain(item) for item in given)


def _is_plain(item: Any) -> bool:
    if not isinstance(item, dict) or item.get("namespace"):
        return False
    match item.get("type"):
        case "message" | None:
            return _is_plain_message(item)
        case "reasoning":
            return _is_plain_reasoning(item)
        case "function_call":
            return _has_texts(item, "call_id", "name", "arguments")
        case "function_call_output":
            return _has_texts(item, "call_id") and _have_kinds(item.get("output"), OUTPUTS)
    return False


def _is_plain_message(item: dict[str, Any]) -> bool:
    """Of an assistant's message llama.cpp needs the type and a list, and vLLM all that was in the answer."""
    role, content = item.get("role"), item.get("content")
    if not isinstance(role, str) or role not in PARTS:
        return False
    if role == "assistant" and (isinstance(content, str) or not _has_texts(item, "type", "id", "status")):
        return False
    return _have_kinds(content, PARTS[role])


def _is_plain_reasoning(item: dict[str, Any]) -> bool:
    """llama.cpp wants the text, which servers of models give; OpenAI's clients send a summary or what only OpenAI can read."""
    content = item.get("content")
    return isinstance(item.get("summary"), list) and _has_texts(item, "id") and bool(content) and _have_kinds(content, THOUGHTS)


def _has_texts(value: dict[str, Any], *names: str) -> bool:
    return all(isinstance(value.get(name), str) for name in names)


def _have_kinds(content: Any, kinds: frozenset[str]) -> bool:
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(_is_one_of(part, kinds) for part in content)


def _is_one_of(part: Any, kinds: frozenset[str]) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str) or part["type"] not in kinds:
        return False
    return isinstance(part.get("image_url" if part["type"] == "input_image" else "text"), str)
