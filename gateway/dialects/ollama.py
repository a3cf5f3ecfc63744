"""Ollama's native API: NDJSON streams, errors as `{"error": "…"}`, token counts in the last record."""

from collections.abc import Sequence
from typing import Any

from gateway.core import strict_json
from gateway.core.errors import BadRequest, GatewayError
from gateway.dialects import tokens
from gateway.dialects.answers import BadFrame, cached_token_count, duration_s, read_answer, token_count, try_read
from gateway.dialects.dialect import Call, Framing, Kind, Operation, Usage
from gateway.dialects.fields import bounded, expect, expect_messages, expect_tools, is_over, text_of, wish
from gateway.dialects.refused_fields import CHECKED_FIELDS
from gateway.dialects.tokens import NO_TOKENS, Need
from gateway.dialects.translation.native_chat import ChatWriter
from gateway.dialects.translation.native_generate import GenerateWriter
from gateway.dialects.translation.native_records import timestamp

KNOWN_FIELDS = frozenset(
    "model name prompt suffix system template context stream raw format images options keep_alive think truncate shift "
    "logprobs top_logprobs messages tools input dimensions verbose insecure username password from files adapters "
    "parameters license quantize source destination modelfile path".split()
)
NUMBERS = frozenset(
    "num_predict num_ctx num_batch num_gpu main_gpu num_thread num_keep seed top_k repeat_last_n draft_num_predict "
    "top_p min_p typical_p temperature repeat_penalty presence_penalty frequency_penalty".split()
)
BOOLEAN_OPTIONS = frozenset("numa low_vram f16_kv logits_all vocab_only use_mmap use_mlock penalize_newline".split())
CACHED = "prompt_eval_cached_count"
NANOSECONDS = 10**9
GENERATE = "/api/generate"


class Ndjson:
    content_type = "application/x-ndjson"
    content_types = frozenset({content_type, "application/json"})
    in_errors = b'"error"'

    def end_of_frames(self, data: bytes) -> int:
        return data.rfind(b"\n") + 1

    def payloads(self, data: bytes) -> list[bytes]:
        return [line for line in data.split(b"\n") if line and line.strip()]

    def count(self, data: bytes) -> int:
        return data.count(b"\n")


class Ollama:
    name = "ollama"
    framing: Framing = Ndjson()
    known_fields = KNOWN_FIELDS | CHECKED_FIELDS
    tolerates_fields = needs_first = False

    def __init__(self) -> None:
        kinds: frozenset[Kind] = frozenset({"ollama"})
        ended = ("done", "done_reason")
        self.operations: Sequence[Operation] = (
            Operation("/api/chat", "by default", kinds, _check_chat, _clamp, ended, _need_of_chat, has_runner_options=True),
            Operation(
                GENERATE, "by default", kinds, _check_generate, _clamp, ended, _need_of_generate, has_runner_options=True
            ),
            Operation("/api/embed", "never", kinds, _check_embed, need=_need_of_embed, has_runner_options=True),
            Operation("/api/embeddings", "never", kinds, _check_embeddings, need=_need_of_embeddings, has_runner_options=True),
            Operation("/api/show", "never", kinds, _check_common),
        )

    def error(self, error: GatewayError, request_id: str) -> bytes:
        # In a 401 Ollama's own client ignores `error` and shows `status`.
        words = {"error": error.message}
        return strict_json.write({**words, "status": error.message} if error.status == 401 else words)

    def heartbeat(self, call: Call, now_ns: int) -> bytes:
        writer = GenerateWriter if call.operation.path == GENERATE else ChatWriter
        return writer(call.asked_model).ping(timestamp(now_ns))

    def error_frame(self, error: GatewayError, tail: Sequence[bytes] = ()) -> bytes:
        return strict_json.write({"error": error.message}) + b"\n"

    def judge_frame(self, payload: bytes) -> None:
        if not isinstance(read_answer(payload), dict):
            raise BadFrame("not an object")

    def is_complete(self, tail: Sequence[bytes], call: Call) -> bool:
        last = try_read(tail[-1]) if tail else {}
        return bool(last.get("done") or last.get("done_reason"))

    def usage(self, tail: Sequence[bytes]) -> Usage:
        return self.usage_of(try_read(tail[-1]) if tail else {})

    def usage_of(self, answer: Any) -> Usage:
        fields = answer if isinstance(answer, dict) else {}
        prompt, completion = token_count(fields.get("prompt_eval_count")), token_count(fields.get("eval_count"))
        # A server that reports cached tokens (Ollama 0.33.3) includes them in the prompt's count.
        again = cached_token_count(fields[CACHED]) if CACHED in fields else None
        return Usage(prompt, completion, again, *_seconds(fields))

    def has_last_frame(self, frames: bytes) -> bool:
        return b'"done":true' in frames

    def is_plain(self, frames: bytes) -> bool:
        return frames.endswith(b"\n") and b'"done":true' not in frames

    def hides_usage(self, call: Call) -> bool:
        return False

    def without_usage(self, frames: bytes) -> bytes:
        return frames

    def answer_text(self, data: bytes) -> str:
        return "".join(_text(try_read(payload)) for payload in self.framing.payloads(data))


def _seconds(fields: dict[str, Any]) -> tuple[float | None, float | None, float | None]:
    """Seconds of loading, of the prompt and of the answer. Embeddings come with their total alone, which includes the load."""
    if "total_duration" not in fields:
        return None, None, None
    load = duration_s(fields.get("load_duration"), NANOSECONDS)
    prefill = duration_s(fields.get("prompt_eval_duration"), NANOSECONDS)
    decode = duration_s(fields.get("eval_duration"), NANOSECONDS)
    if prefill is None and decode is None and (total := duration_s(fields["total_duration"], NANOSECONDS)) is not None:
        prefill = max(0.0, total - (load or 0.0))
    return load, prefill, decode


def _text(record: dict[str, Any]) -> str:
    message = record.get("message")
    text = text_of(message, "thinking", "content") if isinstance(message, dict) else ""
    return text + text_of(record, "thinking", "response")


def _wish(body: dict[str, Any]) -> int | None:
    return wish((body.get("options") or {}).get("num_predict"))


def _need_of_chat(body: dict[str, Any]) -> Need:
    """Without messages the model is only loaded or unloaded."""
    messages = body.get("messages")
    if not messages:
        return NO_TOKENS
    return Need(tokens.of_messages(messages) + tokens.of_fields(body, tokens.SETTINGS_AND_MESSAGES), _wish(body))


def _need_of_generate(body: dict[str, Any]) -> Need:
    return Need(tokens.of_fields(body), _wish(body)) if body.get("prompt") else NO_TOKENS


def _need_of_embed(body: dict[str, Any]) -> Need:
    return Need(tokens.of_fields(body), 0) if body.get("input") else NO_TOKENS


def _need_of_embeddings(body: dict[str, Any]) -> Need:
    return Need(tokens.of_fields(body), 0) if body.get("prompt") else NO_TOKENS


def _clamp(body: dict[str, Any], kind: Kind, cap: int, default: int) -> int:
    options = dict(body.get("options") or {})
    wished = options.get("num_predict")
    options["num_predict"] = default if wished is None else bounded(wished, cap)
    body["options"] = options
    return cap if is_over(wished, cap) else 0


def _check_common(body: dict[str, Any]) -> None:
    expect(body, "options", dict, "an object")
    expect(body, "keep_alive", (str, int, float), "a number of seconds or a duration such as '5m'")
    _check_options(body.get("options") or {})


def _check_options(options: dict[str, Any]) -> None:
    for name in options.keys() & NUMBERS:
        value = options[name]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise BadRequest(f"the option {name!r} must be a number")
    for name in options.keys() & BOOLEAN_OPTIONS:
        if options[name] is not None and not isinstance(options[name], bool):
            raise BadRequest(f"the option {name!r} must be true or false")
    stop = options.get("stop")
    if stop is not None and not _is_list_of_strings(stop):
        raise BadRequest("the option 'stop' must be a list of strings")


def _is_list_of_strings(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_chat(body: dict[str, Any]) -> None:
    _check_common(body)
    expect_messages(body)
    expect_tools(body)


def _check_generate(body: dict[str, Any]) -> None:
    _check_common(body)
    for name in ("prompt", "suffix", "system", "template"):
        expect(body, name, str, "a string")
    for name in ("images", "context"):
        expect(body, name, list, "a list")


def _check_embed(body: dict[str, Any]) -> None:
    _check_common(body)
    value = body.get("input")
    if value is not None and not isinstance(value, str) and not _is_list_of_strings(value):
        raise BadRequest("the field 'input' must be a string or a list of strings")


def _check_embeddings(body: dict[str, Any]) -> None:
    _check_common(body)
    expect(body, "prompt", str, "a string")
