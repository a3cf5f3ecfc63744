"""What all client languages share: operations, calls, frames and the shape of an answer. No I/O."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gateway.core import strict_json
from gateway.core.errors import BadRequest, GatewayError
from gateway.dialects.fields import boolean, model_of
from gateway.dialects.model_names import ModelName, canonical, is_plain
from gateway.dialects.refused_fields import refuse_beyond
from gateway.dialects.tokens import NO_TOKENS, Need

Kind = Literal["ollama", "openai"]
Streaming = Literal["by default", "on request", "never"]
# Of a model's context, for the answer of who names no bound.
UNSAID_SHARE = 4


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


def read_call(dialect: Dialect, operation: Operation, raw: bytes) -> Call:
    body = strict_json.read_object(raw, dialect.known_fields)
    refuse_beyond(body)
    asked = model_of(body)
    operation.check(body)
    stream = operation.streaming != "never" and boolean(body, "stream", default=operation.streaming == "by default")
    return Call(operation, asked, canonical(asked), stream, body)
