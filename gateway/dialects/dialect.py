"""What all client languages share: operations, calls, frames and the shape of an answer. No I/O."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.core import strict_json
from gateway.core.errors import BadRequest, GatewayError
from gateway.dialects import large_json
from gateway.dialects.model_names import NAME_RULE, ModelName, canonical, is_name, is_plain
from gateway.dialects.refused_fields import refuse_beyond
from gateway.dialects.tokens import NO_TOKENS, Need

Kind = Literal["ollama", "openai"]
Streaming = Literal["by default", "on request", "never"]
LONGEST_FRAME = 8 * 2**20
LONGEST_COPIED_MESSAGE = 1000
JSON = frozenset({"application/json"})
# Of a model's context, for the answer of who names no bound.
UNSAID_SHARE = 4
CODE = re.compile(r"[A-Za-z0-9_.-]{1,40}")


class BadFrame(Exception):
    """The first of an answer is an error or not an answer at all; the message is for the log, `error` what was read."""

    def __init__(self, message: str, error: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.error = error or {}


class LongFrame(Exception):
    """The first of an answer is longer than a frame may be."""


@dataclass(frozen=True)
class Usage:
    """Tokens as the backend counted them; None where it did not say. Those that it had cached are part of the prompt's."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


@dataclass(frozen=True)
class Operation:
    """One thing a client may ask of a model: `path` is both our route and the backend's.

    `clamp` bounds the output tokens of a body to its third argument, to its fourth where the caller named no bound; it returns
    what a caller got who asked for more, else 0.

    A whole answer has one of the fields `answers_with`, neither empty nor false; without it the answer is none. `need` tells
    how many tokens a request may take; without it the operation takes none.
    """

    path: str
    streaming: Streaming
    kinds: frozenset[Kind]
    check: Callable[[dict[str, Any]], None]
    clamp: Callable[[dict[str, Any], Kind, int, int], int] | None = None
    answers_with: tuple[str, ...] = ()
    need: Callable[[dict[str, Any]], Need] | None = None


@dataclass(slots=True)
class Call:
    """A client's request, read and checked; `context` is the model's in tokens where a larger wish is refused there, else 0.

    `capped` is the most tokens of each answer where it asked for more, `needs` what it takes of limits, once that is known.
    """

    operation: Operation
    asked_model: str
    model: ModelName
    stream: bool
    body: dict[str, Any] = field(repr=False)
    context: int = 0
    capped: int = 0
    needs: Need = NO_TOKENS

    def need(self, most_output: int) -> Need:
        try:
            found = self.operation.need(self.body) if self.operation.need else NO_TOKENS
        except RecursionError:
            raise BadRequest("the body is nested too deeply") from None
        return found if found.output is None else found._replace(output=min(found.output, most_output))

    def body_for(self, kind: Kind, spelling: str, cap: int) -> bytes:
        """What is sent to a backend: what was read, its output bounded by `cap` tokens, the model as that backend spells it."""
        body = dict(self.body)
        if not is_plain(self.asked_model, self.model.canonical) or kind == "openai":
            body["model"] = spelling
        if self.operation.clamp is not None:
            # A prompt has to fit in as well, and who names no bound wants no refusal.
            unsaid = min(cap, self.context // UNSAID_SHARE) or cap if self.context else cap
            self.capped = self.operation.clamp(body, kind, cap, unsaid)
        return strict_json.write_strictly(body)


class Framing(Protocol):
    """How a stream is cut into frames that a client reads one by one."""

    content_type: str
    # What backends may call it; Ollama loads a model with one JSON object, also where a stream was asked for.
    content_types: frozenset[str]

    def end_of_frames(self, data: bytes) -> int:
        """The position behind the last complete frame."""

    def payloads(self, data: bytes) -> list[bytes]:
        """The JSON texts of complete frames, comments left out."""

    def count(self, data: bytes) -> int:
        """About how many frames: each is about one token."""


class Dialect(Protocol):
    name: str
    framing: Framing
    operations: Sequence[Operation]
    known_fields: frozenset[str]

    def error(self, error: GatewayError, request_id: str) -> bytes: ...

    def error_frame(self, error: GatewayError) -> bytes: ...

    def judge_frame(self, payload: bytes) -> None:
        """Raises BadFrame where the first frame of a stream is no answer."""

    def is_complete(self, tail: Sequence[bytes], call: Call) -> bool:
        """Whether a stream that ends with these payloads has said everything."""

    def usage(self, tail: Sequence[bytes]) -> Usage:
        """As the last frames of a stream tell it."""

    def usage_of(self, answer: Any) -> Usage:
        """As a whole answer tells it."""

    def says_last(self, frames: bytes) -> bool:
        """Whether a client may take these frames for the end, whatever comes behind them."""

    def is_plain(self, frames: bytes) -> bool:
        """Whether these are whole frames and none says that it is the last, at a glance."""

    def hides_usage(self, call: Call) -> bool:
        """Whether the backend was asked for counts that the caller did not ask for."""

    def without_usage(self, frames: bytes) -> bytes:
        """Complete frames without such counts."""

    def said(self, data: bytes) -> str:
        """The text of an answer, whole or in frames."""


def content_type_of(told: str, framing: Framing | None = None) -> str:
    """The type of an answer in the dialect: as the backend told it where that is one of ours. Whole answers have no framing."""
    known = JSON if framing is None else framing.content_types
    if told in known:
        return told
    kind, _, more = told.lower().replace(" ", "").partition(";")
    if kind in known and more in ("", "charset=utf-8"):
        return told
    return "application/json" if framing is None else framing.content_type


def read_call(dialect: Dialect, operation: Operation, raw: bytes) -> Call:
    body = strict_json.read_object(raw, dialect.known_fields)
    refuse_beyond(body)
    asked = model_of(body)
    operation.check(body)
    stream = operation.streaming != "never" and boolean(body, "stream", default=operation.streaming == "by default")
    return Call(operation, asked, canonical(asked), stream, body)


def model_of(body: dict[str, Any]) -> str:
    """`model`, or the deprecated `name` where the dialect knows it; two that differ are refused."""
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


def expect_messages(body: dict[str, Any]) -> None:
    """Backends answer 500 to a role that is no text, and to calls of tools that name none."""
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
    """A wish for output tokens as a number from 1 to `cap`: negative, zero, absent and absurd ones mean the cap."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= cap:
        return int(value)
    return cap


def is_over(value: object, cap: int) -> bool:
    """Whether `bounded` makes less of a wish: one for more than `cap`, or for as many as there are."""
    return value is not None and not (isinstance(value, int | float) and 1 <= value <= cap)


def read_answer(payload: bytes) -> Any:
    """A whole answer or a frame as JSON; raises BadFrame where it is an error or no JSON object."""
    try:
        value = large_json.read(payload)
    except ValueError:
        raise BadFrame("not JSON") from None
    if isinstance(value, dict) and value.get("error"):
        raise BadFrame(f"an error{error_code(value)}", value)
    if not isinstance(value, dict | list) or not value:
        raise BadFrame("no answer in it")
    return value


def judge_whole(value: Any, operation: Operation) -> None:
    """Raises BadFrame where a whole answer lacks what makes it one; several prompts may be answered by a list."""
    answers = value if isinstance(value, list) else [value]
    wanted = operation.answers_with
    if wanted and not all(isinstance(answer, dict) and any(answer.get(name) for name in wanted) for answer in answers):
        raise BadFrame(f"no {' or '.join(wanted)} in it")


def try_read(payload: bytes) -> dict[str, Any]:
    try:
        value = large_json.read(payload)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def error_text(value: dict[str, Any]) -> str:
    """The words of an error in any of the shapes that backends use."""
    told = value.get("error") or value.get("detail") or value.get("message")
    if isinstance(told, dict):
        told = told.get("message")
    return " ".join(str(told or "").split())[:LONGEST_COPIED_MESSAGE]


def error_code(value: dict[str, Any]) -> str:
    """An error's code or type for the log. Its words stay out: they may repeat the prompt."""
    told = value["error"] if isinstance(value["error"], dict) else {}
    codes = [str(told[name]) for name in ("code", "type") if CODE.fullmatch(str(told.get(name) or ""))]
    return f" ({', '.join(codes)})" if codes else ""


def count(value: object) -> int | None:
    """A token count of a backend, which may be null, negative, a fraction or huge."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 2**53:
        return None
    return int(value)


def cached(value: object) -> int | None:
    """Of a prompt's tokens those that a backend says it had cached: a whole number, for what is none makes no call cheaper."""
    return value if value.__class__ is int and 0 <= value < 2**53 else None


def wish(value: object) -> int | None:
    """A bound on output that a caller named, None where it is none."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(value) if is_number and value >= 1 else None  # type: ignore[call-overload,operator]


def text_of(message: dict[str, Any], *names: str) -> str:
    """What a message or a part of one says, with the tools it calls."""
    texts = [message[name] for name in names if isinstance(message.get(name), str)]
    calls = message.get("tool_calls")
    return "".join(texts) + (strict_json.write_anyhow(calls).decode("utf-8", "replace") if calls else "")
