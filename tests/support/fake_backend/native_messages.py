"""/v1/messages and /v1/messages/count_tokens, as Ollama (without the counts) and llama.cpp have them."""

from typing import TYPE_CHECKING, Any

from tests.support.fake_backend.content import Json, after_pause
from tests.support.fake_backend.native_turn import (
    LLAMACPP,
    Turn,
    event_frames,
    fields_of,
    flattened,
    refused_by_llamacpp,
    turn_of,
)
from tests.support.fake_backend.scripts import SSE, Close, End, Head, How, Piece, Received, Reset, Step, answer, compact, stream

if TYPE_CHECKING:
    from tests.support.fake_backend.answers import HealthyServer

_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
REQUEST_ID = "req_8409a9dff66cbbbb3460062c"


def respond(healthy: "HealthyServer", request: Received) -> list[Step]:
    is_ollama = healthy.kind == "ollama"
    try:
        fields = fields_of(request)
    except ValueError:
        return _refused(healthy, 400 if is_ollama else 500, "unexpected EOF")
    if is_ollama and fields is None:
        return _refused(healthy, 400, "json: cannot unmarshal array into Go value of type anthropic.MessagesRequest")
    if is_ollama and fields is not None:
        return _as_ollama(healthy, fields)
    if fields is None or "messages" not in fields:
        return _refused(healthy, 500, "'messages' is required")
    turn = _turn_of(healthy, fields)
    if request.path.endswith("/count_tokens"):
        return answer(200, {"input_tokens": turn.prompt}, "application/json; charset=utf-8", LLAMACPP)
    return _answered(healthy, fields, turn)


def _refused(healthy: "HealthyServer", status: int, words: str) -> list[Step]:
    if healthy.kind != "ollama":
        return refused_by_llamacpp(status, words)
    error = {"type": _TYPES.get(status, "api_error"), "message": words}
    return answer(status, {"type": "error", "error": error, "request_id": REQUEST_ID}, "application/json")


def _as_ollama(healthy: "HealthyServer", fields: Json) -> list[Step]:
    if not fields.get("model"):
        return _refused(healthy, 400, "model is required")
    if not isinstance(fields.get("max_tokens"), int) or fields["max_tokens"] <= 0:
        return _refused(healthy, 400, "max_tokens is required and must be positive")
    if not fields.get("messages"):
        return _refused(healthy, 400, "messages is required")
    if _has_image_by_url(fields):
        return _refused(healthy, 400, "invalid image source type: url. Only base64 images are supported.")
    if not healthy.has(fields["model"]):
        return _refused(healthy, 404, f"model '{fields['model']}' not found")
    return _answered(healthy, fields, _turn_of(healthy, fields))


def _has_image_by_url(fields: Json) -> bool:
    contents = [message.get("content") for message in fields["messages"]]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return any(block.get("type") == "image" and block["source"]["type"] == "url" for block in blocks)


def _turn_of(healthy: "HealthyServer", fields: Json) -> Turn:
    given = fields["messages"] if isinstance(fields["messages"], list) else []
    messages = [{"role": message["role"], "content": flattened(message.get("content"))} for message in given]
    system = [{"role": "system", "content": flattened(fields["system"])}] if fields.get("system") else []
    last: Any = given[-1]["content"] if given else ""
    is_after_tool = isinstance(last, list) and any(block["type"] == "tool_result" for block in last)
    tools = [{"name": tool["name"], "parameters": tool.get("input_schema") or {}} for tool in fields.get("tools") or []]
    return turn_of(healthy, [*system, *messages], tools, is_after_tool, fields)


def _stop_reason(turn: Turn) -> str:
    if turn.is_cut:
        return "max_tokens"
    return "tool_use" if turn.calls else "end_turn"


def _answered(healthy: "HealthyServer", fields: Json, turn: Turn) -> list[Step]:
    if fields.get("stream"):
        events = _ollama_events(fields, turn) if healthy.kind == "ollama" else _llamacpp_events(fields, turn)
        return stream(event_frames(events), pause_s=healthy.pause_s)
    whole = _whole(healthy, fields, turn)
    ended = b"\n" if healthy.kind == "ollama" else b""
    headers = [] if healthy.kind == "ollama" else [LLAMACPP]
    steps = answer(200, compact(whole) + ended, "application/json", *headers)
    return after_pause(steps, healthy.pause_s * turn.completion)


def _whole(healthy: "HealthyServer", fields: Json, turn: Turn) -> Json:
    blocks: list[Json] = []
    if turn.thinking:
        signed = {} if healthy.kind == "ollama" else {"signature": ""}
        blocks.append({"type": "thinking", "thinking": "".join(turn.thinking), **signed})
    if turn.text:
        blocks.append({"type": "text", "text": "".join(turn.text)})
    blocks += [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments} for call in turn.calls]
    if healthy.kind == "ollama":
        usage, ended = {"input_tokens": turn.prompt, "output_tokens": turn.completion}, {"stop_reason": _stop_reason(turn)}
        return {**_message("msg_49b64eea91c7489152e3b641", fields), "content": blocks, **ended, "usage": usage}
    counted = {**_cached_usage(turn), "output_tokens": turn.completion}
    return {**_message(LLAMACPP_ID, fields), "content": blocks, **_stop(turn), "usage": counted}


LLAMACPP_ID = "chatcmpl-0JSCfbP4xw13LH4P9ogwjdj2VURmx6RN"


def _message(name: str, fields: Json) -> Json:
    return {"id": name, "type": "message", "role": "assistant", "model": fields.get("model", "")}


def _stop(turn: Turn) -> Json:
    return {"stop_reason": _stop_reason(turn), "stop_sequence": None}


def _cached_usage(turn: Turn) -> Json:
    return {"cache_read_input_tokens": turn.cached, "input_tokens": turn.prompt - turn.cached}


def _delta(index: int, kind: str, name: str, text: str) -> Json:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, name: text}}


def _opened(index: int, block: Json) -> Json:
    return {"type": "content_block_start", "index": index, "content_block": block}


def _closed(index: int) -> Json:
    return {"type": "content_block_stop", "index": index}


def _ollama_events(fields: Json, turn: Turn) -> list[Json]:
    """The prompt's tokens are an estimate at first; each call comes whole in one delta."""
    started = {**_message("msg_49b64eea91c7489152e3b641", fields), "content": []}
    events: list[Json] = [{"type": "message_start", "message": {**started, "usage": {"input_tokens": 2, "output_tokens": 0}}}]
    index = 0
    if turn.thinking:
        deltas = [_delta(index, "thinking_delta", "thinking", piece) for piece in turn.thinking]
        events += [_opened(index, {"type": "thinking", "thinking": ""}), *deltas, _closed(index)]
        index += 1
    if turn.text:
        deltas = [_delta(index, "text_delta", "text", piece) for piece in turn.text]
        events += [_opened(index, {"type": "text", "text": ""}), *deltas, _closed(index)]
        index += 1
    for number, call in enumerate(turn.calls, index):
        block = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
        events += [_opened(number, block), _delta(number, "input_json_delta", "partial_json", call.written), _closed(number)]
    usage = {"input_tokens": turn.prompt, "output_tokens": turn.completion}
    ended = {"type": "message_delta", "delta": {"stop_reason": _stop_reason(turn)}, "usage": usage}
    return [*events, ended, {"type": "message_stop"}]


def _llamacpp_events(fields: Json, turn: Turn) -> list[Json]:
    """All blocks close at the end; arguments come in pieces, and a call starts without an `input`."""
    empty = {"stop_reason": None, "stop_sequence": None, "usage": {**_cached_usage(turn), "output_tokens": 0}}
    message = {**_message(LLAMACPP_ID, fields), "content": [], **empty}
    events: list[Json] = [{"type": "message_start", "message": message}]
    open_blocks: list[int] = []
    if turn.thinking:
        events.append(_opened(0, {"type": "thinking", "thinking": ""}))
        events += [_delta(0, "thinking_delta", "thinking", piece) for piece in turn.thinking]
        open_blocks.append(0)
    if turn.text:
        index = len(open_blocks)
        events.append(_opened(index, {"type": "text", "text": ""}))
        events += [_delta(index, "text_delta", "text", piece) for piece in turn.text]
        open_blocks.append(index)
    for call in turn.calls:
        index = len(open_blocks)
        events.append(_opened(index, {"type": "tool_use", "id": call.id, "name": call.name}))
        pieces = [call.written[:1], call.written[1:4], call.written[4:]]
        events += [_delta(index, "input_json_delta", "partial_json", piece) for piece in pieces]
        open_blocks.append(index)
    signature = [_delta(0, "signature_delta", "signature", "")] if turn.thinking else []
    ended = {"type": "message_delta", "delta": _stop(turn), "usage": {"output_tokens": turn.completion}}
    return [*events, *signature, *map(_closed, open_blocks), ended, {"type": "message_stop"}]


def _begun(text: str) -> list[bytes]:
    usage = {"cache_read_input_tokens": 0, "input_tokens": 2, "output_tokens": 0}
    message = {**_message(LLAMACPP_ID, {}), "content": [], "stop_reason": None, "stop_sequence": None, "usage": usage}
    opened = _opened(0, {"type": "text", "text": ""})
    return event_frames([{"type": "message_start", "message": message}, opened, _delta(0, "text_delta", "text", text)])


def error_midway(kind: str, text: str = "It was a") -> list[Step]:
    """llama.cpp sends an event with an error of its own form; Ollama sends nothing more and ends the stream in order."""
    error = {"code": 500, "message": "slot unavailable", "type": "server_error"}
    failed = [b"event: error\ndata: %b\n\n" % compact(error)] if kind == "openai" else []
    return stream([*_begun(text), *failed])


def death_midway(text: str = "It was a", how: How = "reset") -> list[Step]:
    last: Step = Reset() if how == "reset" else Close()
    head = Head(200, [("Content-Type", SSE)], chunked=True)
    return [head, *map(Piece, _begun(text)), last]


def silent_midway(*after: Step, text: str = "It was a") -> list[Step]:
    """The beginning of a stream; what follows is given."""
    return [Head(200, [("Content-Type", SSE)], chunked=True), *map(Piece, _begun(text)), *(after or [End()])]
