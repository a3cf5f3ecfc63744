"""Tokens of a request in Anthropic's Messages API before a backend has counted them."""

from typing import Any

from gateway.dialects import tokens
from gateway.dialects.fields import wish
from gateway.dialects.tokens import Need

# Parts of blocks that no model is shown.
UNREAD = frozenset("type id tool_use_id cache_control signature citations is_error data".split())


def rough_need(body: dict[str, Any]) -> Need:
    """What any object needs, before it is read: what is not as it should be counts as text, or not at all.

    Nothing that is nested too deeply to be counted is sent to a backend.
    """
    try:
        found = _of_system(body.get("system")) + _of_messages(body.get("messages")) + _of_tools(body.get("tools"))
        # A server hands these to its chat template, which may write them into the prompt.
        found += _of_format(body) + tokens.of_value(body.get("chat_template_kwargs"))
    except RecursionError:
        found = 0
    return Need(max(1, found), wish(body.get("max_tokens")))


def _of_system(system: Any) -> int:
    return tokens.TOKENS_PER_MESSAGE + _of_content(system) if system else 0


def _of_messages(messages: Any) -> int:
    if not isinstance(messages, list):
        return tokens.of_value(messages)
    return sum(tokens.TOKENS_PER_MESSAGE + _of_message(message) for message in messages)


def _of_message(message: Any) -> int:
    return _of_content(message.get("content")) if isinstance(message, dict) else tokens.of_value(message)


def _of_content(content: Any) -> int:
    if not isinstance(content, list):
        return tokens.of_value(content)
    return sum(_of_block(block) if isinstance(block, dict) else tokens.of_value(block) for block in content)


def _of_block(block: dict[str, Any]) -> int:
    match block.get("type"):
        case "image":
            return _of_image(block.get("source"))
        case "tool_result":
            return tokens.TOKENS_PER_MESSAGE + _of_content(block.get("content"))
        case "document":
            return _of_document(block)
        case _:
            return sum(tokens.of_value(value) for name, value in block.items() if name not in UNREAD)


def _of_image(source: Any) -> int:
    if not isinstance(source, dict):
        return tokens.of_media(source)
    return tokens.of_media(source.get("data") or source.get("url"))


def _of_document(block: dict[str, Any]) -> int:
    """A text, a list of blocks, or a file in base64, which is counted as an image of its size."""
    source = block.get("source")
    head = sum(tokens.of_value(block.get(name)) for name in ("title", "context"))
    if not isinstance(source, dict):
        return head + tokens.of_value(source)
    if source.get("type") == "text":
        return head + tokens.of_value(source.get("data"))
    return head + (_of_image(source) if source.get("data") else _of_content(source.get("content")))


def _of_tools(tools: Any) -> int:
    if not isinstance(tools, list):
        return tokens.of_value(tools)
    return sum(_of_tool(tool) if isinstance(tool, dict) else tokens.of_value(tool) for tool in tools)


def _of_tool(tool: dict[str, Any]) -> int:
    """A tool that only Anthropic runs reaches no backend."""
    if tool.get("type") not in (None, "custom") and not tool.get("input_schema"):
        return 0
    return tokens.of_json([tool.get("name"), tool.get("description"), tool.get("input_schema") or {}])


def _of_format(body: dict[str, Any]) -> int:
    config = body.get("output_config")
    wanted = (config.get("format") if isinstance(config, dict) else None) or body.get("output_format")
    return tokens.of_json(wanted.get("schema")) if isinstance(wanted, dict) else 0
