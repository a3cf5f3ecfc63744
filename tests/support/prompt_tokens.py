"""The tokens of a prompt that has been read: what the rough counts of unread requests are compared with."""

from gateway.dialects import tokens
from gateway.dialects.translation.conversation import Image, Part, Prompt, Text, Thinking, ToolCall, ToolResult


def estimate(prompt: Prompt) -> int:
    found = sum(tokens.TOKENS_PER_MESSAGE + _of_parts(message.parts) for message in prompt.messages)
    found += sum(tokens.of_json([tool.name, tool.description, tool.schema]) for tool in prompt.tools)
    found += tokens.of_json(prompt.format.schema) if prompt.format else 0
    return max(1, found)


def _of_parts(parts: tuple[Part, ...]) -> int:
    return sum(_of_part(part) for part in parts)


def _of_part(part: Part) -> int:
    match part:
        case Text(text) | Thinking(text):
            return tokens.of_text(text)
        case Image():
            return tokens.of_media(part.data or part.url)
        case ToolCall():
            return tokens.of_text(part.name + part.arguments)
        case ToolResult():
            return tokens.TOKENS_PER_MESSAGE + _of_parts(part.content)
