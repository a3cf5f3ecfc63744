"""The OpenAI API as Ollama, vLLM, llama.cpp and LM Studio serve it: server-sent events, `{"error": {…}}`, `usage`."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest, GatewayError
from gateway.dialects import openai_media, tokens
from gateway.dialects.answers import BadFrame, cached_token_count, duration_s, read_answer, token_count, try_read
from gateway.dialects.dialect import Call, Framing, Kind, Operation, Usage
from gateway.dialects.fields import bounded, expect, expect_messages, expect_number, expect_tools, is_over, text_of, wish
from gateway.dialects.refused_fields import CHECKED_FIELDS
from gateway.dialects.tokens import Need

CAPS = frozenset({"max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict"})
MOST_CHOICES = 128
CHOICES = frozenset({"n", "n_cmpl", "best_of"})
NUMBERS = frozenset({*CAPS, "min_tokens", "temperature", "top_p", "seed", "frequency_penalty", "presence_penalty"})
KNOWN_FIELDS = frozenset(
    "model messages prompt input stream stream_options temperature top_p top_k seed stop tools tool_choice n n_cmpl best_of "
    "max_tokens max_completion_tokens max_new_tokens n_predict min_tokens use_beam_search ignore_eos logprobs top_logprobs "
    "logit_bias response_format reasoning reasoning_effort frequency_penalty presence_penalty suffix echo user encoding_format "
    "dimensions keep_alive options include_usage".split()
)
# Counts of images and speech.
INPUT, OUTPUT, TOTAL = "input_tokens", "output_tokens", "total_tokens"
ALL_BUT_PROMPT, ALL_BUT_INPUT = tokens.SETTINGS | {"prompt"}, tokens.SETTINGS | {"input"}
UNKNOWN = Usage()
# The last payload of a stream; some servers send it in other dialects, too.
DONE = b"[DONE]"
DETAILS = "prompt_tokens_details"
MILLISECONDS = 1000
# Lines end with \n, \r\n or \r, and an event with an empty line (https://html.spec.whatwg.org/multipage/server-sent-events.html).
END_OF_EVENT = re.compile(rb"\n\n|\n\r\n?|\r\r\n?")
# No server spreads one JSON object over more lines.
MOST_LINES = 1000
# An event for token counts is far smaller; a larger one is passed on unchanged.
LARGEST_USAGE_EVENT = 16 * 1024
# Servers that are asked for counts add an empty count to every chunk.
NOTHING = rb'(?:null|\{"prompt_tokens"\s?:\s?0,\s?"completion_tokens"\s?:\s?0,\s?"total_tokens"\s?:\s?0\})'
NO_USAGE = re.compile(rb',\s?"usage"\s?:\s?' + NOTHING + rb'(?=\s?[,}])|(?<=\{)"usage"\s?:\s?' + NOTHING + rb"\s?,\s?")
NO_CHOICES = re.compile(rb'"choices"\s?:\s?(?:\[\s?\]|null)')
# A comment. An empty line after it would be an event without data for some clients, after an `id:` for OpenAI's own.
HEARTBEAT = b": waiting\n"


class ServerSentEvents:
    content_type = "text/event-stream"
    content_types = frozenset({content_type})
    in_errors = b'"error"'

    def end_of_frames(self, data: bytes) -> int:
        if data.endswith(b"\n\n"):
            return len(data)
        if b"\n" not in data and b"\r" not in data:
            return 0
        return max(
            data.rfind(b"\n\n") + 2 if b"\n\n" in data else 0,
            # At the end of the data this may be the first part of \n\r\n.
            _behind(data, data.rfind(b"\n\r", 0, len(data) - 1)) if b"\n\r" in data else 0,
            _behind(data, data.rfind(b"\r\r")) if b"\r\r" in data else 0,
        )

    def payloads(self, data: bytes) -> list[bytes]:
        events: list[bytes] = []
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        for event in data.split(b"\n\n"):
            if b"data:" not in event:
                continue
            lines = event.split(b"\n", MOST_LINES) if b"\n" in event else [event]
            if found := [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]:
                events.append(b"\n".join(found))
        return events

    def count(self, data: bytes) -> int:
        return data.count(b"data:")


def _behind(data: bytes, mark: int) -> int:
    """The end of a mark of two bytes whose last is \\r, with the \\n that may belong to it; 0 without a mark."""
    return mark + 2 + (data[mark + 2 : mark + 3] == b"\n") if mark >= 0 else 0


class OpenAI:
    name = "openai"
    framing: Framing = ServerSentEvents()
    known_fields = KNOWN_FIELDS | CHECKED_FIELDS | openai_media.FIELDS
    tolerates_fields = needs_first = False
    error_types = {  # noqa: RUF012
        400: "invalid_request_error",
        401: "invalid_request_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "invalid_request_error",
        413: "invalid_request_error",
        415: "invalid_request_error",
        431: "invalid_request_error",
        422: "invalid_request_error",
        429: "requests",
        501: "invalid_request_error",
    }

    def __init__(self) -> None:
        kinds: frozenset[Kind] = frozenset({"ollama", "openai"})
        self.operations: Sequence[Operation] = (
            Operation("/v1/chat/completions", "on request", kinds, _check_chat, _clamp, ("choices",), _need_of_chat),
            Operation("/v1/completions", "on request", kinds, _check_completion, _clamp, ("choices",), _need_of_completion),
            Operation("/v1/embeddings", "never", kinds, _check_embeddings, None, ("data",), _need_of_embeddings),
            *openai_media.OPERATIONS,
        )

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return strict_json.write({"error": self.error_fields(error)})

    def error_fields(self, error: GatewayError) -> dict[str, object]:
        kind = error.kind or self.error_types.get(error.status, "server_error")
        return {"message": error.message, "type": kind, "param": None, "code": error.code, **error.fields}

    def heartbeat(self, call: Call, now_ns: int) -> bytes:
        return HEARTBEAT

    def error_frame(self, error: GatewayError, tail: Sequence[bytes] = ()) -> bytes:
        return b"data: " + self.error(error, "") + b"\n\n"

    def judge_frame(self, payload: bytes) -> None:
        value = read_answer(payload)
        if not isinstance(value, dict):
            raise BadFrame("not an object")
        # Ollama drops the text of an error here and sends a chunk without a model instead.
        if value.get("model") == "" and not _has_content(value):
            raise BadFrame("an empty chunk without a model")

    def is_complete(self, tail: Sequence[bytes], call: Call) -> bool:
        if not tail:
            return False
        if tail[-1].startswith(DONE):
            return not any(try_read(payload).get("error") for payload in tail[:-1])
        values = [try_read(payload) for payload in tail]
        if values[-1].get("type") in openai_media.LAST_EVENTS:
            return not any(value.get("error") for value in values)
        # Some servers omit the last line. A finished choice does not mean that the others are finished.
        ended = any(choice.get("finish_reason") for value in values for choice in _choices(value))
        return ended and _answers(call.body) == 1

    def usage(self, tail: Sequence[bytes]) -> Usage:
        for payload in reversed(tail):
            if b'"usage"' in payload or b'"timings"' in payload:
                found = self.usage_of(try_read(payload))
                if found is not UNKNOWN:
                    return found
        return UNKNOWN

    def usage_of(self, answer: Any) -> Usage:
        if not isinstance(answer, dict):
            return UNKNOWN
        counts, timings = answer.get("usage"), answer.get("timings")
        if isinstance(counts, dict) and (counts.get("prompt_tokens") or counts.get("completion_tokens")):
            again = _cached(counts, answer) if DETAILS in counts or timings else None
            prompt, completion = token_count(counts.get("prompt_tokens")), token_count(counts.get("completion_tokens"))
            return Usage(prompt, completion, again, None, *seconds_of(timings)) if timings else Usage(prompt, completion, again)
        if isinstance(timings, dict):
            # llama.cpp counts cached tokens separately here, and together with the others in `usage`.
            before, read = token_count(timings.get("cache_n")) or 0, token_count(timings.get("prompt_n")) or 0
            generated, again = token_count(timings.get("predicted_n")), cached_token_count(timings.get("cache_n"))
            return Usage(before + read, generated, again, None, *seconds_of(timings))
        return _other_counts(counts) if isinstance(counts, dict) else UNKNOWN

    def has_last_frame(self, frames: bytes) -> bool:
        return DONE in frames[-16:]

    def is_plain(self, frames: bytes) -> bool:
        return frames.endswith(b"\n\n") and DONE not in frames[-16:]

    def hides_usage(self, call: Call) -> bool:
        options = call.body.get("stream_options") or {}
        return call.stream and options.get("include_usage") is not True and call.operation.clamp is not None

    def without_usage(self, frames: bytes) -> bytes:
        if b'"usage"' not in frames:
            return frames
        if len(frames) <= LARGEST_USAGE_EVENT:
            kept = NO_USAGE.sub(b"", frames)
            if b'"usage"' not in kept and not NO_CHOICES.search(kept):
                return kept
        return b"".join(self._shown_parts(frames))

    def _shown_parts(self, frames: bytes) -> Iterator[bytes]:
        """The frames without counts; only events that contain the word are examined, each byte once."""
        done = 0
        while (found := frames.find(b'"usage"', done)) >= 0:
            begin = done + self.framing.end_of_frames(frames[done : found + 1])
            ended = END_OF_EVENT.search(frames, found)
            end = ended.end() if ended else len(frames)
            yield frames[done:begin]
            event = frames[begin:end]
            if len(event) > LARGEST_USAGE_EVENT:
                yield event
            elif not self._is_usage_only(event):
                yield NO_USAGE.sub(b"", event)
            done = end
        yield frames[done:]

    def _is_usage_only(self, event: bytes) -> bool:
        """Whether an event has nothing but counts, or an empty place for them."""
        values = [try_read(payload) for payload in self.framing.payloads(event)]
        return bool(values) and all("usage" in value and not value.get("choices") and "error" not in value for value in values)

    def answer_text(self, data: bytes) -> str:
        payloads = [data] if data.lstrip()[:1] == b"{" else self.framing.payloads(data)
        return "".join(_text(choice) for payload in payloads for choice in _choices(try_read(payload)))


def seconds_of(timings: Any) -> tuple[float | None, float | None]:
    """The seconds for a prompt and for its answer as llama.cpp reports them, with the last chunk of a stream."""
    if not isinstance(timings, dict):
        return None, None
    return duration_s(timings.get("prompt_ms"), MILLISECONDS), duration_s(timings.get("predicted_ms"), MILLISECONDS)


def _other_counts(usage: dict[str, Any]) -> Usage:
    """Counts of images and speech, or of a reranker that reports only their sum."""
    if usage.get(INPUT) or usage.get(OUTPUT):
        return Usage(token_count(usage.get(INPUT)), token_count(usage.get(OUTPUT)))
    return Usage(token_count(usage[TOTAL]), 0) if usage.get(TOTAL) else UNKNOWN


def _cached(usage: dict[str, Any], answer: dict[str, Any]) -> int | None:
    """Cached tokens as vLLM, Ollama and llama.cpp report them, or as older versions of llama.cpp did."""
    details, timings = usage.get(DETAILS), answer.get("timings")
    if isinstance(details, dict) and (found := cached_token_count(details.get("cached_tokens"))) is not None:
        return found
    return cached_token_count(timings.get("cache_n")) if isinstance(timings, dict) else None


def _text(choice: dict[str, Any]) -> str:
    parts = [choice.get(name) for name in ("delta", "message")]
    texts = (text_of(part, "reasoning", "reasoning_content", "content") for part in parts if isinstance(part, dict))
    return text_of(choice, "text") + "".join(texts)


def _need_of_chat(body: dict[str, Any]) -> Need:
    rest = tokens.of_fields(body, tokens.SETTINGS_AND_MESSAGES)
    return Need(tokens.of_messages(body["messages"]) + rest, _wish(body), _answers(body))


def _need_of_completion(body: dict[str, Any]) -> Need:
    return Need(tokens.of_input(body["prompt"]) + tokens.of_fields(body, ALL_BUT_PROMPT), _wish(body), _answers(body))


def _need_of_embeddings(body: dict[str, Any]) -> Need:
    return Need(tokens.of_input(body["input"]) + tokens.of_fields(body, ALL_BUT_INPUT), 0)


def _wish(body: dict[str, Any]) -> int | None:
    wishes = [found for name in body.keys() & CAPS if (found := wish(body[name])) is not None]
    return min(wishes) * _answers(body) if wishes else None


def _choices(value: dict[str, Any]) -> list[dict[str, Any]]:
    choices = value.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []


def _has_content(value: dict[str, Any]) -> bool:
    return any(
        choice.get("finish_reason") or choice.get("text") or any((choice.get("delta") or {}).values())
        for choice in _choices(value)
    )


def _clamp(body: dict[str, Any], kind: Kind, cap: int, default: int) -> int:
    """Limits the tokens of all choices of all prompts together, in the fields that this kind of backend reads.

    Ollama reads `max_tokens` alone; llama.cpp n_predict before max_completion_tokens before max_tokens; vLLM the last two.
    """
    answers = _answers(body)
    if answers > cap:
        raise BadRequest(f"{answers} answers in one request are too many: at most {cap} tokens are allowed for all of them")
    each = cap // answers
    wishes = [wished for name in body.keys() & CAPS if (wished := body.pop(name)) is not None]
    body["max_tokens"] = min((bounded(wished, each) for wished in wishes), default=max(1, default // answers))
    if kind == "openai":
        body["max_completion_tokens"] = body["max_tokens"]
    if body.get("stream") is True:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    # A frame of many tokens would count as one if the caller leaves before the backend reports its count.
    body.pop("stream_interval", None)
    if "min_tokens" in body and isinstance(body["min_tokens"], int | float):
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"])
    return each if wishes and all(is_over(wished, each) for wished in wishes) else 0


def _answers(body: dict[str, Any]) -> int:
    """How many answers a request asks for: choices times prompts."""
    asked = body.keys() & CHOICES
    choices = max(int(body[name] or 1) for name in asked) if asked else 1
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return choices * len(prompt) if several else choices  # type: ignore[arg-type]


def _check_common(body: dict[str, Any]) -> None:
    if "stream_options" in body:
        expect(body, "stream_options", dict, "an object")
        strict_json.refuse_case_variants(body["stream_options"] or {}, ("include_usage",))
    expect_number(body, NUMBERS)
    for name in body.keys() & CHOICES:
        value = body[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_CHOICES):
            raise BadRequest(f"the field {name!r} must be an integer from 1 to {MOST_CHOICES}")


def _check_chat(body: dict[str, Any]) -> None:
    _check_common(body)
    if body.get("messages") is None:
        raise BadRequest("the field 'messages' is missing")
    expect_messages(body)
    expect_tools(body)


def _check_completion(body: dict[str, Any]) -> None:
    _check_common(body)
    if body.get("prompt") is None:
        raise BadRequest("the field 'prompt' is missing")
    expect(body, "prompt", (str, list), "a string or a list")


def _check_embeddings(body: dict[str, Any]) -> None:
    if body.get("input") is None:
        raise BadRequest("the field 'input' is missing")
    expect(body, "input", (str, list), "a string or a list")
