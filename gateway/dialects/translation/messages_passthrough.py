"""Requests of Anthropic's Messages API for a backend that has this API itself.

Only fields that a model server has reach it. Some servers answer 400 to what is Anthropic's own, and others act on fields that
reach beyond the model: Ollama searches the web with the account of its operator for whoever sends the tool.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gateway.dialects.dialect import Kind
from gateway.dialects.translation.dropped_names import drop
from gateway.dialects.translation.messages_request import refuse_what_needs_a_memory

PASSED = frozenset(
    "model system messages max_tokens stream temperature top_p top_k stop_sequences tools tool_choice thinking output_config "
    "output_format metadata chat_template_kwargs".split()
)
# Every server reads these blocks, or ignores them as a model does without them. An unknown one is a 400 of vLLM's, and
# Ollama and llama.cpp leave it out without a word.
BLOCKS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "user": frozenset({"text", "image", "tool_result"}),
        "assistant": frozenset({"text", "thinking", "redacted_thinking", "tool_use"}),
    }
)
BLOCKS_OF_OLLAMA = MappingProxyType({**BLOCKS, "system": frozenset({"text"})})
RESULTS = frozenset({"text", "image"})
EFFORTS = (None, "low", "medium", "high", "xhigh", "max")


def without_unsupported(body: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The body for such a backend, with what stays in its order, and the names of what was taken out.

    Raises BadRequest on what asks for an earlier answer, which nobody keeps.
    """
    refuse_what_needs_a_memory(body)
    dropped: list[str] = []
    kept = {name: value for name, value in body.items() if name in PASSED}
    for name, value in body.items():
        if name not in PASSED and value is not None:
            drop(name, dropped)
    if isinstance(body.get("tools"), list):
        kept["tools"] = [tool for tool in body["tools"] if _is_kept(tool, dropped)]
        if not kept["tools"]:
            del kept["tools"]
    return kept, dropped


def _is_kept(tool: Any, dropped: list[str]) -> bool:
    """Whether the client runs a tool. Ollama reads names in any case, and a type that begins with web_search as its own."""
    if not isinstance(tool, dict):
        return True
    kind = tool.get("type") or "custom"
    is_unclear = not isinstance(kind, str) or any(name != "type" and name.casefold() == "type" for name in tool)
    is_own = kind == "custom" or isinstance(tool.get("input_schema"), dict)
    if not is_unclear and is_own and not kind.casefold().startswith("web_search"):
        return True
    drop("tools.type" if is_unclear else f"tools.{kind}", dropped)
    return False


def passes_unchanged(body: dict[str, Any], kind: Kind) -> bool:
    """Whether every server of this kind with this API does what `body` asks for; else the request is better translated.

    `body` is what `without_unsupported` returns. Servers leave out, without a word: a format (Ollama, llama.cpp), a choice of
    one tool or of none (Ollama, llama.cpp), thinking that is off (vLLM, llama.cpp), blocks that they do not know. The
    beginning of an answer is given again by llama.cpp, and not continued by others.
    """
    choice, config, thinking = (body.get(name) or {} for name in ("tool_choice", "output_config", "thinking"))
    if not all(isinstance(value, dict) for value in (choice, config, thinking)):
        return False
    if choice.get("type") not in (None, "auto", "any") or (choice.get("type") == "any" and not body.get("tools")):
        return False
    is_ollama = kind == "ollama"
    if not is_ollama and thinking.get("type") not in (None, "enabled", "adaptive"):
        return False
    if config.get("effort") not in EFFORTS:
        return False
    if config.get("format") or body.get("output_format"):
        return False
    if not _are_plain(body.get("messages"), BLOCKS_OF_OLLAMA if is_ollama else BLOCKS):
        return False
    return is_ollama or body["messages"][-1]["role"] != "assistant"


def _are_plain(messages: Any, blocks: Mapping[str, frozenset[str]]) -> bool:
    return isinstance(messages, list) and bool(messages) and all(_is_plain(message, blocks) for message in messages)


def _is_plain(message: Any, blocks: Mapping[str, frozenset[str]]) -> bool:
    """Templates that llama.cpp and vLLM use refuse a system message that is not the first; those of Ollama do not."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message["role"] not in blocks:
        return False
    return _have_kinds(message.get("content"), blocks[message["role"]])


def _have_kinds(content: Any, kinds: frozenset[str]) -> bool:
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(_is_one_of(block, kinds) for block in content)


def _is_one_of(block: Any, kinds: frozenset[str]) -> bool:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str) or block["type"] not in kinds:
        return False
    return block["type"] != "tool_result" or block.get("content") is None or _have_kinds(block["content"], RESULTS)
