"""Estimates of tokens before a backend has counted them: one for four ASCII characters, one for any other character."""

from typing import Any, NamedTuple

from gateway.core import strict_json

LETTERS_PER_TOKEN = 4
TOKENS_PER_MESSAGE = 4
# A picture or sound in base64 costs a fixed number of tokens, and more if it is large.
TOKENS_PER_IMAGE, LETTERS_PER_TOKEN_OF_MEDIA = 768, 2048
MEDIA = frozenset(
    "images image image_url input_image image_embeds input_audio audio_url video video_url file multimodal_data "
    "multi_modal_data".split()
)
# The tokens of each message include these.
ROLES = ("user", "assistant", "system", "tool", "developer", "function")
CONTENT, ROLE = "content", "role"
PLAIN_MESSAGE = frozenset({ROLE, CONTENT})
# Fields of a body that no template and no backend makes part of a prompt.
SETTINGS = frozenset(
    "model name stream stream_options options keep_alive stop user metadata encoding_format dimensions service_tier "
    "logit_bias temperature top_p top_k min_p seed n max_tokens max_completion_tokens max_new_tokens n_predict "
    "frequency_penalty presence_penalty".split()
)
SETTINGS_AND_MESSAGES = SETTINGS | {"messages"}
LONGEST_KIND = 16


class Need(NamedTuple):
    """Tokens that a request will use: of its prompt, and of its answer if it sets a limit.

    `prompt` is -1 if the operation uses no tokens; `answers` is how many answers the request asks for.
    """

    prompt: int = -1
    output: int | None = 0
    answers: int = 1


NO_TOKENS = Need()


def of_text(text: str) -> int:
    """Chinese or Cyrillic text takes about one token a character, English text a quarter."""
    if text.isascii():
        return -(-len(text) // LETTERS_PER_TOKEN)
    letters = len(text.encode("ascii", "ignore"))
    return -(-letters // LETTERS_PER_TOKEN) + len(text) - letters


def of_json(value: Any) -> int:
    return of_text(strict_json.write_with_replacements(value).decode("utf-8", "replace")) if value else 0


def of_messages(messages: list[dict[str, Any]]) -> int:
    found = TOKENS_PER_MESSAGE * len(messages)
    for message in messages:
        found += of_content(message.get(CONTENT))
        if message.keys() != PLAIN_MESSAGE or message[ROLE] not in ROLES:
            found += sum(of_field(name, value) for name, value in message.items() if name != CONTENT and value not in ROLES)
    return found


def of_content(content: Any) -> int:
    """Content is a string, or a list of parts: texts, pictures, sounds."""
    if isinstance(content, str):
        return of_text(content)
    if not isinstance(content, list):
        return of_value(content)
    return sum(_of_part(part) for part in content)


def _of_part(part: Any) -> int:
    if not isinstance(part, dict):
        return of_value(part)
    kind = part.get("type")
    is_plain = isinstance(kind, str) and len(kind) <= LONGEST_KIND
    return sum(of_field(name, value) for name, value in part.items() if not (is_plain and name == "type"))


def of_fields(body: dict[str, Any], without: frozenset[str] = SETTINGS) -> int:
    """All other fields of a body: some template or backend may make any of them part of the prompt."""
    return sum(of_field(name, body[name]) for name in body.keys() - without)


def of_field(name: str, value: Any) -> int:
    """Backends written in Go ignore the case of nested names."""
    return of_media(value) if value and name.casefold() in MEDIA else of_value(value)


def of_value(value: Any) -> int:
    """A string, or an object or list with its names; each number in a list is a token."""
    if isinstance(value, str):
        return of_text(value)
    if isinstance(value, dict):
        return of_json(value)
    if not isinstance(value, list):
        return 0
    others = [item for item in value if type(item) is not int]
    return len(value) - len(others) + of_json(others)


def of_media(value: Any) -> int:
    """One picture or sound, or a list of them."""
    return sum(_of_medium(one) for one in (value if isinstance(value, list) else [value]))


def _of_medium(value: Any) -> int:
    letters = len(value) if isinstance(value, str) else len(strict_json.write_with_replacements(value))
    return TOKENS_PER_IMAGE + letters // LETTERS_PER_TOKEN_OF_MEDIA


def of_input(value: Any) -> int:
    """What is to be completed or embedded: a string, token numbers, an object with text and pictures, or a list of these."""
    if isinstance(value, str):
        return of_text(value)
    if isinstance(value, dict):
        return of_fields(value, frozenset())
    if not isinstance(value, list):
        return 1
    others = [item for item in value if type(item) is not int]
    return len(value) - len(others) + sum(of_input(item) for item in others)
