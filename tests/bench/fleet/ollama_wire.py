"""The answers of a simulated machine, in Ollama's own dialect and in OpenAI's."""

import hashlib
import re
import time
from dataclasses import dataclass
from typing import Any

import orjson

from tests.bench.fleet.machine import Call
from tests.bench.fleet.vram import Model, Prompt

LETTERS_PER_TOKEN, TOKENS_OF_A_PICTURE = 4, 600
DEFAULT_OUTPUT, MOST_OUTPUT = 128, 4000
STAMP = "2026-01-01T00:00:00Z"
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
Json = dict[str, Any]


def prompt_of(body: Json) -> Prompt:
    messages = body.get("messages") or [{"role": "user", "content": body.get("prompt") or body.get("input") or ""}]
    return tuple(_message(message) for message in messages)


def _message(message: Json) -> tuple[int, int]:
    content, pictures = message.get("content"), message.get("images") or ()
    text = content if isinstance(content, str) else str(content)
    tokens = max(1, len(text) // LETTERS_PER_TOKEN) + TOKENS_OF_A_PICTURE * len(pictures)
    return hash((message.get("role"), text, *pictures)), tokens


def output_of(body: Json, *, native: bool) -> int:
    options = body.get("options") or {}
    asked = options.get("num_predict") if native else body.get("max_tokens") or body.get("max_completion_tokens")
    return asked if isinstance(asked, int) and 0 < asked <= MOST_OUTPUT else DEFAULT_OUTPUT


def keep_alive_of(body: Json) -> float | None:
    """In seconds: a number, or a duration such as `5m`. Less than zero is for ever."""
    value = body.get("keep_alive")
    if isinstance(value, str) and (found := re.fullmatch(r"(-?\d+(?:\.\d+)?)(ms|s|m|h)?", value)):
        value = float(found[1]) * UNITS[found[2] or "s"]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if value >= 0 else float("inf")


def entry(model: Model) -> Json:
    details = {"format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "8B", "quantization_level": "Q4_0"}
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": STAMP,
        "size": int(model.gigabytes * 1e9),
        "digest": hashlib.sha256(model.name.encode()).hexdigest(),
        "details": {"parent_model": "", **details},
    }


def openai_entry(model: Model) -> Json:
    return {"id": model.name, "object": "model", "created": 1, "owned_by": "library"}


def running(model: Model, left_s: float) -> Json:
    """An entry of /api/ps; `left_s` in seconds of the wall clock."""
    ends = time.gmtime(time.time() + min(left_s, 1e9))
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", ends)
    return {**entry(model), "size_vram": int(model.gigabytes * 1e9), "context_length": 8192, "expires_at": expires}


def show(model: Model) -> Json:
    info = {"general.architecture": "llama", "llama.context_length": 131_072}
    return {"details": entry(model)["details"], "model_info": info, "capabilities": ["completion"], "modified_at": STAMP}


def words(count: int) -> str:
    return "word " * count


@dataclass(frozen=True)
class NativeWire:
    """NDJSON of /api/chat and /api/generate. `scale`: how many seconds are reported for one of the machine's."""

    path: str
    scale: float
    content_type: str = "application/x-ndjson"

    def chunk(self, call: Call, count: int) -> bytes:
        return _line({**self._head(call), **self._text(words(count)), "done": False})

    def end(self, call: Call) -> bytes:
        return _line({**self._head(call), **self._text(""), **self._cost(call)})

    def whole(self, call: Call) -> Json:
        if self.path == "/api/embed":
            return {"model": call.model.name, "embeddings": [[0.1, 0.2]], **self._durations(call)}
        return {**self._head(call), **self._text(words(call.done)), **self._cost(call)}

    def without_prompt(self, model: Model, reason: str, load_s: float) -> Json:
        """The answer to a request that only loads or unloads."""
        cost = {"done": True, "done_reason": reason, "load_duration": int(load_s * self.scale * 1e9)}
        return {"model": model.name, "created_at": STAMP, **self._text(""), **cost}

    def error(self, message: str) -> Json:
        return {"error": message}

    def _head(self, call: Call) -> Json:
        return {"model": call.model.name, "created_at": STAMP}

    def _text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text}} if self.path == "/api/chat" else {"response": text}

    def _cost(self, call: Call) -> Json:
        return {"done": True, "done_reason": "stop", **self._durations(call), "eval_count": call.done}

    def _durations(self, call: Call) -> Json:
        first = call.first_at or call.ended
        return {
            "total_duration": self._ns(call.ended - call.began),
            "load_duration": self._ns(call.load_s),
            "prompt_eval_count": call.prompt_tokens,
            "prompt_eval_duration": self._ns(first - call.slot_at),
            "eval_duration": self._ns(call.ended - first),
        }

    def _ns(self, seconds: float) -> int:
        return max(0, int(seconds * self.scale * 1e9))


@dataclass(frozen=True)
class OpenaiWire:
    """Server-sent events of /v1/chat/completions and /v1/completions."""

    path: str
    content_type: str = "text/event-stream"

    def chunk(self, call: Call, count: int) -> bytes:
        return _event(self._choice(call, self._delta(words(count)), None))

    def end(self, call: Call) -> bytes:
        usage = {**self._head(call, chunk=True), "choices": [], "usage": self._usage(call)}
        return _event(self._choice(call, self._delta(""), "stop")) + _event(usage) + b"data: [DONE]\n\n"

    def whole(self, call: Call) -> Json:
        if self.path == "/v1/embeddings":
            data = [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2]}]
            return {"object": "list", "model": call.model.name, "data": data, "usage": self._usage(call)}
        text = words(call.done)
        part = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choices = [{"index": 0, **part, "finish_reason": "stop"}]
        return {**self._head(call, chunk=False), "choices": choices, "usage": self._usage(call)}

    def error(self, message: str) -> Json:
        return {"error": {"message": message, "type": "api_error", "param": None, "code": None}}

    @property
    def _is_chat(self) -> bool:
        return self.path == "/v1/chat/completions"

    def _head(self, call: Call, *, chunk: bool) -> Json:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self._is_chat else "text_completion"
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": call.model.name}

    def _delta(self, text: str) -> Json:
        return {"delta": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}

    def _choice(self, call: Call, part: Json, reason: str | None) -> Json:
        return {**self._head(call, chunk=True), "choices": [{"index": 0, **part, "finish_reason": reason}]}

    def _usage(self, call: Call) -> Json:
        total = call.prompt_tokens + call.done
        return {"prompt_tokens": call.prompt_tokens, "completion_tokens": call.done, "total_tokens": total}


def _line(content: Json) -> bytes:
    return orjson.dumps(content) + b"\n"


def _event(content: Json) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"
