"""Recognises the requests of one conversation, so that each can go where its prompt is cached. No I/O.

A prompt cache serves a prompt from its beginning to the first difference. So a conversation is named for what it began with:
its tools and system prompt, and its messages up to the end of each request. A request is stored under one name and looked for
under the names of the requests before it. No text can be read from a name, and no key has the names of another.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

from gateway.fleet.prompt_checksum import PromptChecksum

NAME_BYTES, LONGEST_SALT = 12, 64
# This request may have been sent before, and so were those before it.
MOST_PREFIXES = 6
# Fields and headers in which clients name a conversation, the most exact first; LONGEST_ID bounds what counts of one.
ID_FIELDS = ("prompt_cache_key", "session_id")
ID_HEADERS = (
    b"x-session-id x-olla-session-id thread-id session-id session_id conversation_id conversation-id x-claude-code-session-id "
    b"x-opencode-session x-session-affinity x-openwebui-chat-id"
).split()
ID_HEADER_NAMES = frozenset(ID_HEADERS)
LONGEST_ID = 512
SYSTEM_FIELDS = ("system", "instructions")
SYSTEM_ROLES = frozenset({"system", "developer"})
# The last messages, among which the ends of earlier requests are looked for.
MOST_EXAMINED = 512
# The steps in which a prompt without messages is compared with earlier ones.
BLOCK = 2_048


# A name and its tokens.
Shared = tuple[str, int] | None


class Conversation(NamedTuple):
    """The names of a conversation; all are empty if the request has no prompt.

    `full` names the conversation as it is after this request. `prefixes` are the names under which this request, or an earlier
    one of the same conversation, was stored, with the tokens that they have in common, longest first. `shared` is the name of
    its tools and system prompt, with their tokens.
    """

    full: str = ""
    prefixes: tuple[tuple[str, int], ...] = ()
    shared: Shared = None


class _Names:
    """Names of prompts for one key; `salt` is a secret of the installation."""

    def __init__(self, key_id: str, salt: bytes) -> None:
        key = key_id.encode("utf-8", "replace") + b"\0"
        self._hash = blake2b(key, digest_size=NAME_BYTES, key=salt[:LONGEST_SALT])

    def name(self, kind: bytes, prompt: PromptChecksum, given_id: bytes = b"") -> str:
        found = self._hash.copy()
        found.update(kind + prompt.state() + given_id)
        return found.hexdigest()


def conversation(
    body: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]], key_id: str, salt: bytes, *, prompt_tokens: int = 0
) -> Conversation:
    """The names of a request that asks for an answer in words.

    `headers` have names in lower case. If `prompt_tokens` are known already, a conversation with a name of its own is only read
    where it begins and ends.
    """
    messages = body.get("messages") or body.get("input")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    text = body.get("prompt")
    if not isinstance(messages, list) and not (isinstance(text, str) and text):
        return Conversation()
    names, prompt = _Names(key_id, salt), PromptChecksum()
    if tools := body.get("tools"):
        prompt.add_tools(tools)
    for name in SYSTEM_FIELDS:
        if name in body:
            prompt.add_content(body[name])
    if not isinstance(messages, list):
        return _of_text(str(text), names, prompt)
    begin = _system_messages(messages)
    if begin:
        prompt.add_messages(messages, 0, begin)
    shared = _shared(names, prompt)
    if given_id := _given_id(body, headers):
        return _with_id(messages, begin, given_id, names, prompt, shared, prompt_tokens)
    return _without_id(messages, begin, names, prompt, shared)


def _shared(names: _Names, prompt: PromptChecksum) -> Shared:
    return (names.name(b"shared", prompt), prompt.tokens) if prompt.has_begun else None


def _without_id(messages: Sequence[Any], begin: int, names: _Names, prompt: PromptChecksum, shared: Shared) -> Conversation:
    """Named for all messages, and for those up to the end of each of the last requests."""
    ends = list(islice(_ends_of_requests(messages, begin), MOST_PREFIXES - 1))
    found: list[tuple[str, int]] = []
    for end in (*reversed(ends), len(messages)):
        prompt.add_messages(messages, begin, end)
        begin = end
        found.append((names.name(b"messages", prompt), prompt.tokens))
    return Conversation(found[-1][0], tuple(reversed(found)), shared)


def _with_id(
    messages: Sequence[Any],
    begin: int,
    given_id: bytes,
    names: _Names,
    prompt: PromptChecksum,
    shared: Shared,
    prompt_tokens: int,
) -> Conversation:
    """Named for what the client calls it and for its first request.

    Agents call what they do beside a conversation by the same name, such as finding a title for it. Once they have shortened a
    conversation, its messages are cached no more.
    """
    first = _first_end(messages, begin)
    last = next(_ends_of_requests(messages, begin), len(messages))
    prompt.add_messages(messages, begin, first)
    name, in_first = names.name(b"id", prompt, given_id), prompt.tokens
    if prompt_tokens and last > first:
        new = PromptChecksum()
        new.add_messages(messages[last:], 0, len(messages) - last)
        return Conversation(name, ((name, max(in_first, prompt_tokens - new.count())),), shared)
    prompt.add_messages(messages, first, last)
    return Conversation(name, ((name, prompt.count()),), shared)


def _of_text(text: str, names: _Names, prompt: PromptChecksum) -> Conversation:
    """Named for its whole blocks, because the next prompt begins with this one and the answer."""
    shared = _shared(names, prompt)
    whole = len(text) // BLOCK
    if not whole:
        prompt.add_content(text)
        name = names.name(b"text", prompt)
        return Conversation(name, ((name, prompt.tokens),), shared)
    found: list[tuple[str, int]] = []
    begin = 0
    for end in range(max(1, whole + 1 - MOST_PREFIXES), whole + 1):
        for number in range(begin, end):
            prompt.add_text(text[number * BLOCK : (number + 1) * BLOCK])
        begin = end
        found.append((names.name(b"text", prompt), prompt.tokens))
    return Conversation(found[-1][0], tuple(reversed(found)), shared)


def _system_messages(messages: Sequence[Any]) -> int:
    """How many messages of the system are at the beginning."""
    for number, message in enumerate(messages):
        if message.__class__ is not dict or message.get("role") not in SYSTEM_ROLES:
            return number
    return len(messages)


def _ends_of_requests(messages: Sequence[Any], begin: int) -> Iterator[int]:
    """Where earlier requests ended, the latest first: there the model's words follow on the client's."""
    is_by_model = False
    for number in range(len(messages) - 1, max(begin, len(messages) - MOST_EXAMINED) - 1, -1):
        was_by_model, is_by_model = is_by_model, _is_by_model(messages[number])
        if was_by_model and not is_by_model:
            yield number + 1


def _first_end(messages: Sequence[Any], begin: int) -> int:
    """Where the first request ended."""
    for number in range(begin + 1, len(messages)):
        if _is_by_model(messages[number]) and not _is_by_model(messages[number - 1]):
            return number
    return len(messages)


def _is_by_model(message: Any) -> bool:
    if message.__class__ is not dict:
        return False
    role = message.get("role")
    if role is not None:
        return bool(role == "assistant")
    # An item of the Responses API.
    kind = message.get("type")
    return kind.__class__ is str and (kind == "reasoning" or kind.endswith("_call"))


def _given_id(body: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    for name in ID_FIELDS:
        if (given := body.get(name)) and isinstance(given, str):
            return _bytes(given)
    if found := {name: value for name, value in headers if value and name in ID_HEADER_NAMES}:
        return next(found[name] for name in ID_HEADERS if name in found)[:LONGEST_ID]
    metadata = body.get("metadata")
    given = metadata.get("user_id") if isinstance(metadata, dict) else None
    return _bytes(given) if isinstance(given, str) else b""


def _bytes(given: str) -> bytes:
    return given[:LONGEST_ID].encode("utf-8", "replace")
