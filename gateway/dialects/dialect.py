"""What all dialects share: operations, calls, framing and the interface of a dialect. No I/O."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.core import strict_json
from gateway.core.errors import BadRequest, GatewayError
from gateway.dialects.fields import boolean, model_of
from gateway.dialects.model_names import ModelName, canonical, is_plain
from gateway.dialects.refused_fields import refuse_fields, take_fields_out
from gateway.dialects.tokens import NO_TOKENS, Need

Kind = Literal["ollama", "openai"]
# "by format": on request, with `stream_format` instead of `stream`.
Streaming = Literal["by default", "on request", "by format", "never"]
# An answer for which the caller set no limit gets one part in four of the model's context.
DEFAULT_SHARE = 4


@dataclass(frozen=True)
class Usage:
    """Tokens as the backend counted them, None where it reported none; cached tokens are part of the prompt's.

    The seconds that it took to load the model, to read the prompt and to generate the answer are the backend's, too.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    load_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None


@dataclass(frozen=True)
class Operation:
    """One kind of request to a model; `path` is its path at the gateway and at the backend.

    `clamp` limits the output tokens of a body to its third argument, or to its fourth if the caller set no limit. It returns
    the limit if the caller had asked for more, else 0.

    A complete answer has a true value in one of the fields `answers_with`. `need` estimates the tokens of a request; without
    it the operation uses none. If an operation `is_optional`, some backends of its `kinds` may not have the path, and some of
    other kinds may have it. If it has `media`, its answers may have these types, or types that begin so; the backend decides
    whether it is streamed. The body of a call is a form if it `is_form`, else JSON.

    `trim` returns the body for a backend that has the path, and the names of the fields that were taken out.
    `passes` returns whether backends of a kind that have the path do all that a body asks for. `without_volatile` returns a
    body without the lines that differ between requests. `estimate` is for operations that count a prompt's tokens. If it
    `has_runner_options`, a request may ask the backend to load or keep its model in a certain way.
    """

    path: str
    streaming: Streaming
    # The kinds of backends that always have the path; of others discovery finds out whether they have it.
    kinds: frozenset[Kind]
    check: Callable[[dict[str, Any]], None]
    clamp: Callable[[dict[str, Any], Kind, int, int], int] | None = None
    answers_with: tuple[str, ...] = ()
    need: Callable[[dict[str, Any]], Need] | None = None
    is_optional: bool = False
    media: tuple[str, ...] = ()
    is_form: bool = False
    trim: Callable[[dict[str, Any]], tuple[dict[str, Any], list[str]]] | None = None
    passes: Callable[[dict[str, Any], Kind], bool] | None = None
    without_volatile: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    estimate: Callable[[dict[str, Any]], int] | None = None
    has_runner_options: bool = False


class RunnerOptions(Protocol):
    def apply(self, body: dict[str, Any]) -> list[str]:
        """Changes the fields with which a request would load, keep or unload a model; returns their names."""


class Upload(Protocol):
    """A form that has arrived. Each time it is sent, `model` is the name that this backend knows."""

    content_type: str

    def length(self, model: str) -> int: ...

    def pieces(self, model: str) -> Iterator[bytes]: ...


@dataclass(slots=True)
class Call:
    """A client's request, read and checked.

    `context` is the model's context in tokens if the backend refuses requests that exceed it, else 0. `capped` is the limit
    of each answer in tokens if the caller asked for more. `needs` is what the call counts towards its limits, once that is
    known. If a call `is_for_alias`, backends do not know the name that was asked for; it is put into their answers. `size` is
    that of the request's body in bytes; `upload` is the form whose texts are in `body`. `dropped` names fields of the request
    that no backend got as they were. `estimate` is the number of the prompt's tokens if the call asks for it. `entry` is the
    model's in the list of models. `reply` is the id and the time, in seconds since 1970, of a translated answer of which the
    client may have a part. A caller that `may_unload` models manages them.
    """

    operation: Operation
    asked_model: str
    model: ModelName
    stream: bool
    body: dict[str, Any] = field(repr=False)
    context: int = 0
    capped: int = 0
    needs: Need = NO_TOKENS
    is_for_alias: bool = False
    size: int = 0
    upload: Upload | None = None
    dropped: list[str] = field(default_factory=list)
    estimate: int = 0
    entry: Mapping[str, Any] = field(default_factory=dict, repr=False)
    reply: tuple[str, int] | None = None
    may_unload: bool = False

    def need(self, most_output: int) -> Need:
        try:
            found = self.operation.need(self.body) if self.operation.need else NO_TOKENS
        except RecursionError:
            raise BadRequest("the body is nested too deeply") from None
        return found if found.output is None else found._replace(output=min(found.output, most_output))

    def body_for(self, kind: Kind, spelling: str, cap: int, runner: RunnerOptions | None = None) -> bytes:
        """The JSON for a backend: its output limited to `cap` tokens, the model in that backend's spelling."""
        body = dict(self.body)
        if self.is_for_alias or not is_plain(self.asked_model, self.model.canonical) or kind == "openai":
            body["model"] = spelling
        if self.operation.trim is not None:
            body, taken_out = self.operation.trim(body)
            self.drop(taken_out)
        if runner is not None:
            changed = runner.apply(body)
            if changed:
                self.drop(changed)
        if self.operation.clamp is not None:
            # The prompt needs room in the context, too, and a caller that set no limit must not be refused for ours.
            default = min(cap, self.context // DEFAULT_SHARE) or cap if self.context else cap
            self.capped = self.operation.clamp(body, kind, cap, default)
        return strict_json.write_strictly(body)

    def drop(self, names: Sequence[str]) -> None:
        self.dropped += [name for name in names if name not in self.dropped]


class Framing(Protocol):
    """How a stream is cut into frames that a client reads one by one."""

    content_type: str
    # Content types that backends may send; Ollama answers a request to load a model with one JSON object, even to a stream.
    content_types: frozenset[str]
    # Each frame with an error contains it.
    in_errors: bytes

    def end_of_frames(self, data: bytes) -> int:
        """The end of the last complete frame."""

    def payloads(self, data: bytes) -> list[bytes]:
        """The JSON texts of complete frames, without comments."""

    def count(self, data: bytes) -> int:
        """The approximate number of frames; each is about one token."""


class Dialect(Protocol):
    name: str
    framing: Framing
    operations: Sequence[Operation]
    known_fields: frozenset[str]
    # Fields that no request may have are taken out of a request instead of refusing it.
    tolerates_fields: bool
    # The end of a stream needs its first frame: for counts that the last frames lack, or for what a failure repeats.
    needs_first: bool

    def error(self, error: GatewayError, request_id: str) -> bytes: ...

    def heartbeat(self, call: Call, now_ns: int) -> bytes:
        """A frame without content, for a client that waits for the first one; `now_ns` is in nanoseconds since 1970."""

    def error_frame(self, error: GatewayError, tail: Sequence[bytes] = ()) -> bytes:
        """The frame that ends a stream after these payloads, of which the first may be the stream's first.

        Nothing if they show a failure and nothing may follow.
        """

    def judge_frame(self, payload: bytes) -> None:
        """Raises BadFrame if the first frame of a stream is not an answer."""

    def is_complete(self, tail: Sequence[bytes], call: Call) -> bool:
        """Whether a stream that ends with these payloads is complete."""

    def usage(self, tail: Sequence[bytes]) -> Usage:
        """The counts in the last frames of a stream."""

    def usage_of(self, answer: Any) -> Usage:
        """The counts in a whole answer."""

    def has_last_frame(self, frames: bytes) -> bool:
        """Whether a client may treat these frames as the end, whatever follows."""

    def is_plain(self, frames: bytes) -> bool:
        """Whether these are complete frames without a last one, by a quick check that returns False in doubt."""

    def hides_usage(self, call: Call) -> bool:
        """Whether the gateway asked the backend for counts that the caller did not ask for."""

    def without_usage(self, frames: bytes) -> bytes:
        """Complete frames without those counts."""

    def answer_text(self, data: bytes) -> str:
        """The text of an answer, whole or in frames."""


def read_call(dialect: Dialect, operation: Operation, raw: bytes) -> Call:
    body = strict_json.read_object(raw, dialect.known_fields)
    if dialect.tolerates_fields:
        dropped = take_fields_out(body)
    else:
        refuse_fields(body)
        dropped = []
    asked = model_of(body)
    operation.check(body)
    stream = operation.streaming != "never" and boolean(body, "stream", default=operation.streaming == "by default")
    if operation.streaming == "by format":
        stream = body.get("stream_format") == "sse"
    return Call(operation, asked, canonical(asked), stream, body, dropped=dropped)
