"""Ollama's /api/chat as a client's dialect, for a model whose server has only the OpenAI API."""

from collections import OrderedDict, deque
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.fields import boolean, expect_messages
from gateway.dialects.translation import native_fields as fields
from gateway.dialects.translation.conversation import (
    Image,
    Message,
    Part,
    Prompt,
    Reply,
    Role,
    Text,
    Thinking,
    ToolCall,
    ToolResult,
)
from gateway.dialects.translation.native_records import (
    UNTIMED,
    Durations,
    Fields,
    RecordWriter,
    last_fields,
    load_record,
    whole_content,
)

ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
TOOL = "tool"


def is_load(body: Fields) -> bool:
    """Whether a request only loads or unloads its model; `load_answer` answers it."""
    return not body.get("messages")


def load_answer(body: Fields, model: str, created_at: str) -> Fields:
    return load_record(body, model, created_at, _content)


def read_chat(body: Fields) -> Prompt:
    """Raises BadRequest on what cannot be read, and on what the model's server cannot do."""
    expect_messages(body)
    fields.refuse_lost_fields(body)
    options = fields.options_of(body)
    messages = _messages(body.get("messages") or [])
    return Prompt(
        messages=messages,
        tools=fields.tools_of(body),
        most_output=fields.most_output_of(options),
        stop=fields.stop_of(options),
        sampling=fields.sampling_of(options),
        effort=fields.effort_of(body),
        format=fields.format_of(body),
        stream=boolean(body, "stream", default=True),
        dropped=fields.dropped_of(body, "top_logprobs") + fields.dropped_tools_of(body),
        continues_last=bool(messages) and _is_beginning(messages[-1]),
        client_names={"reasoning_effort": "think"},
    )


def write_chat(reply: Reply, model: str, created_at: str, durations: Durations = UNTIMED) -> Fields:
    """Raises BackendFailed if the model called a tool with arguments that are not an object."""
    last = last_fields(reply.finish, reply.usage, durations, {})
    return {"model": model, "created_at": created_at, **whole_content(reply, _content), **last}


class ChatWriter(RecordWriter):
    def __init__(self, model: str) -> None:
        super().__init__(model, _content, {})


def _content(text: str, thinking: str, calls: list[Fields]) -> Fields:
    message: Fields = {"role": "assistant", "content": text}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    return {"message": message}


def _messages(messages: list[Fields]) -> list[Message]:
    """Neighbouring results of tools become one message, so that nothing comes between them."""
    ids = _CallIds()
    found: list[Message] = []
    results: list[Part] = []
    for message in messages:
        role = str(message.get("role") or "").lower()
        if role == TOOL:
            results.append(_result(message, ids))
            continue
        if results:
            found.append(Message("user", tuple(results)))
            results = []
        found.append(_message(role, message, ids))
    return [*found, Message("user", tuple(results))] if results else found


def _message(role: str, message: Fields, ids: "_CallIds") -> Message:
    if role not in ROLES:
        raise BadRequest("the 'role' of each of 'messages' must be 'system', 'user', 'assistant' or 'tool'")
    if ROLES[role] == "assistant":
        return Message("assistant", _assistant_parts(message, ids))
    if message.get("tool_calls"):
        raise BadRequest("'tool_calls' are only taken in messages of the assistant")
    if ROLES[role] == "system" and message.get("images"):
        raise BadRequest("'images' are only taken in messages of the user and of tools")
    return Message(ROLES[role], _shown_parts(message))


def _is_beginning(message: Message) -> bool:
    """Ollama goes on from a last message that is the assistant's."""
    texts = [part for part in message.parts if isinstance(part, Text) and part.text]
    return message.role == "assistant" and bool(texts) and not any(isinstance(part, ToolCall) for part in message.parts)


def _shown_parts(message: Fields) -> tuple[Text | Image, ...]:
    """Ollama's templates put the images of a message before its text."""
    images, text = fields.images_of(message, "a message"), _string(message, "content")
    return (*images, Text(text)) if text or not images else images


def _assistant_parts(message: Fields, ids: "_CallIds") -> tuple[Part, ...]:
    if message.get("images"):
        raise BadRequest("'images' are only taken in messages of the user and of tools")
    thinking, text = _string(message, "thinking"), _string(message, "content")
    ids.begin()
    parts: list[Part] = [Thinking(thinking)] if thinking else []
    parts += [Text(text)] if text else []
    parts += [_call(call, ids) for call in message.get("tool_calls") or ()]
    return tuple(parts) or (Text(""),)


def _call(call: Fields, ids: "_CallIds") -> ToolCall:
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not name:
        raise BadRequest("each of the 'tool_calls' of a message must be an object with a 'function' that has a 'name'")
    return ToolCall(ids.of_call(_string(call, "id"), name), name, _arguments(function.get("arguments")))


def _arguments(arguments: Any) -> str:
    """An object, or the JSON text of one as the OpenAI API has it."""
    if arguments is None:
        return ""
    if isinstance(arguments, dict):
        return strict_json.write_strictly(arguments).decode()
    if isinstance(arguments, str):
        try:
            if isinstance(strict_json.read_loosely(arguments.encode()), dict):
                return arguments
        except ValueError:
            pass
    raise BadRequest("the 'arguments' of each of the 'tool_calls' of a message must be an object")


def _result(message: Fields, ids: "_CallIds") -> ToolResult:
    if message.get("tool_calls"):
        raise BadRequest("'tool_calls' are only taken in messages of the assistant")
    name = _string(message, "tool_name") or _string(message, "name")
    return ToolResult(ids.of_result(_string(message, "tool_call_id"), name), _shown_parts(message))


def _string(holder: Fields, name: str) -> str:
    value = holder.get(name)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"the {name!r} of each of 'messages' and of their 'tool_calls' must be a string")
    return value or ""


class _CallIds:
    """Gives each tool call an id, and the same id to its result.

    Most of Ollama's clients send no ids: a result belongs to the first open call with its tool's name, or to the first open
    call. Ids depend on nothing but the messages before, so that they stay the same when the conversation goes on.
    """

    def __init__(self) -> None:
        self._count = 0
        self._invented: set[str] = set()
        self._open: OrderedDict[str, str] = OrderedDict()
        self._by_name: dict[str, deque[str]] = {}

    def begin(self) -> None:
        """Results belong to calls of the assistant's last message."""
        self._open.clear()
        self._by_name.clear()

    def of_call(self, given: str, name: str) -> str:
        self._count += 1
        call_id = given or self._invent()
        self._open[call_id] = name
        self._by_name.setdefault(name, deque()).append(call_id)
        return call_id

    def of_result(self, given: str, name: str) -> str:
        """A given id that belongs to no call stands, unless it can only mean a call whose id was invented."""
        if given in self._open:
            del self._open[given]
            return given
        found = self._first(name)
        if given and found not in self._invented:
            return given
        if found:
            del self._open[found]
            return found
        self._count += 1
        return self._invent()

    def _first(self, name: str) -> str:
        named = self._by_name.get(name, deque())
        while named and named[0] not in self._open:
            named.popleft()
        return named[0] if named else next(iter(self._open), "")

    def _invent(self) -> str:
        """Templates of Mistral's models take only ids of nine letters and digits."""
        call_id = f"call{self._count:05d}"
        self._invented.add(call_id)
        return call_id
