"""/v1/responses and /v1/responses/input_tokens, as Ollama (without the counts) and llama.cpp have them."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tests.support.fake_backend.content import Json, after_pause
from tests.support.fake_backend.native_turn import (
    LLAMACPP,
    ToolCall,
    Turn,
    event_frames,
    fields_of,
    flattened,
    refused_by_llamacpp,
    turn_of,
)
from tests.support.fake_backend.scripts import SSE, Close, Head, How, Piece, Received, Reset, Step, answer, compact, stream

if TYPE_CHECKING:
    from tests.support.fake_backend.answers import HealthyServer

_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_KNOWN_TO_OLLAMA = ("message", "function_call", "function_call_output", "reasoning", "web_search_call")
_KNOWN_TO_LLAMACPP = ("message", "function_call", "function_call_output", "reasoning")
ID, MESSAGE, REASONING = "resp_506358", "msg_298946", "rs_112233"


def respond(healthy: "HealthyServer", request: Received) -> list[Step]:
    try:
        fields = fields_of(request)
    except ValueError:
        return _refused(healthy, 400 if healthy.kind == "ollama" else 500, "unexpected EOF")
    if healthy.kind == "ollama":
        return _as_ollama(healthy, fields)
    if fields is None or "input" not in fields:
        return _refused(healthy, 400, "'input' is required")
    if fields.get("previous_response_id"):
        return _refused(healthy, 400, "llama.cpp does not support 'previous_response_id'.")
    if unknown := _unknown(fields, _KNOWN_TO_LLAMACPP):
        return _refused(healthy, 400, f"Cannot determine type of 'item' {unknown}")
    turn = _turn_of(healthy, fields)
    if request.path.endswith("/input_tokens"):
        return answer(200, {"input_tokens": turn.prompt, "object": "response.input_tokens"}, "application/json", LLAMACPP)
    return _answered(healthy, fields, turn)


def _refused(healthy: "HealthyServer", status: int, words: str) -> list[Step]:
    if healthy.kind != "ollama":
        return refused_by_llamacpp(status, words)
    error = {"message": words, "type": _TYPES.get(status, "api_error"), "param": None, "code": None}
    return answer(status, compact({"error": error}) + b"\n", "application/json")


def _as_ollama(healthy: "HealthyServer", fields: Json | None) -> list[Step]:
    if fields is None:
        return _refused(healthy, 400, "json: cannot unmarshal array into Go value of type openai.ResponsesRequest")
    if not fields.get("model"):
        return _refused(healthy, 400, "model is required")
    if unknown := _unknown(fields, _KNOWN_TO_OLLAMA):
        return _refused(healthy, 400, f'input[1]: unknown input item type: "{unknown}"')
    if not healthy.has(fields["model"]):
        return _refused(healthy, 404, f"model '{fields['model']}' not found")
    return _answered(healthy, fields, _turn_of(healthy, fields))


def _unknown(fields: Json, known: Iterable[str]) -> str | None:
    items = fields.get("input")
    kinds = [item.get("type", "message") for item in items] if isinstance(items, list) else []
    return next((kind for kind in kinds if kind not in known), None)


def _turn_of(healthy: "HealthyServer", fields: Json) -> Turn:
    given = fields["input"]
    items: list[Any] = [{"role": "user", "content": given}] if isinstance(given, str) else given
    messages = [{"role": item["role"], "content": flattened(item["content"])} for item in items if "role" in item]
    system = [{"role": "system", "content": fields["instructions"]}] if fields.get("instructions") else []
    is_after_tool = bool(items) and items[-1].get("type") == "function_call_output"
    tools = [{**tool, "parameters": tool.get("parameters") or {}} for tool in _functions(healthy, fields.get("tools") or [])]
    return turn_of(healthy, [*system, *messages], tools, is_after_tool, fields)


def _functions(healthy: "HealthyServer", tools: list[Json]) -> list[Json]:
    """llama.cpp drops every other type; Ollama takes the members of a namespace and makes functions of the rest."""
    if healthy.kind != "ollama":
        return [tool for tool in tools if tool["type"] == "function"]
    found: list[Json] = []
    for tool in tools:
        members = tool["tools"] if tool["type"] == "namespace" else [tool]
        found += [{**member, "name": member.get("name", member["type"])} for member in members]
    return found


def _answered(healthy: "HealthyServer", fields: Json, turn: Turn) -> list[Step]:
    if fields.get("stream"):
        events = _ollama_events(fields, turn) if healthy.kind == "ollama" else _llamacpp_events(fields, turn)
        return stream(event_frames(events), pause_s=healthy.pause_s)
    if healthy.kind == "ollama":
        whole = {**_response(fields, "completed", _output(turn, True)), "usage": _usage(turn, True), "completed_at": 1795900602}
        steps = answer(200, compact(whole) + b"\n", "application/json")
    else:
        whole = {"completed_at": 1795900602, **_short(fields, turn)}
        steps = answer(200, whole, "application/json; charset=utf-8", LLAMACPP)
    return after_pause(steps, healthy.pause_s * turn.completion)


def _usage(turn: Turn, is_ollama: bool) -> Json:
    """Ollama counts no cached tokens here, and llama.cpp no reasoning tokens."""
    usage: Json = {"input_tokens": turn.prompt, "output_tokens": turn.completion, "total_tokens": turn.prompt + turn.completion}
    usage["input_tokens_details"] = {"cached_tokens": 0 if is_ollama else turn.cached}
    return {**usage, "output_tokens_details": {"reasoning_tokens": 0}} if is_ollama else usage


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message_item(turn: Turn) -> Json:
    text = "".join(turn.text)
    return {"id": MESSAGE, "type": "message", "status": "completed", "role": "assistant", "content": [_text_part(text)]}


def _reasoning_item(turn: Turn, is_ollama: bool) -> Json:
    text = "".join(turn.thinking)
    if is_ollama:
        summary = [{"type": "summary_text", "text": text}]
        return {"id": REASONING, "type": "reasoning", "summary": summary, "encrypted_content": text}
    content = [{"text": text, "type": "reasoning_text"}]
    return {"id": REASONING, "summary": [], "type": "reasoning", "content": content, "encrypted_content": ""}


def _call_item(call: ToolCall, status: str = "completed") -> Json:
    arguments = call.written if status == "completed" else ""
    named = {"id": "fc_" + call.id, "type": "function_call", "status": status, "call_id": call.id, "name": call.name}
    return {**named, "arguments": arguments}


def _output(turn: Turn, is_ollama: bool) -> list[Json]:
    items = [_reasoning_item(turn, is_ollama)] if turn.thinking else []
    items += [_message_item(turn)] if turn.text else []
    return items + [_call_item(call) for call in turn.calls]


def _response(fields: Json, status: str, output: list[Json]) -> Json:
    """The response object of Ollama, with all its fields."""
    asked = {"max_output_tokens": fields.get("max_output_tokens"), "instructions": fields.get("instructions")}
    nulls = ("completed_at", "error", "incomplete_details", "previous_response_id", "reasoning", "usage")
    return {
        "id": ID,
        "object": "response",
        "created_at": 1795900602,
        "status": status,
        "model": fields["model"],
        "output": output,
        **dict.fromkeys(nulls),
        **asked,
        "tools": fields.get("tools") or [],
        "tool_choice": "auto",
        "truncation": "disabled",
        "parallel_tool_calls": True,
        "text": {"format": {"type": "text"}},
        "top_p": 1,
        "temperature": 1,
        "store": False,
        "background": False,
        "metadata": {},
    }


def _short(fields: Json, turn: Turn) -> Json:
    """The response object of llama.cpp; also an answer cut at its limit is `completed`."""
    named = {"id": ID, "object": "response", "created_at": 1795900602, "status": "completed"}
    return {**named, "model": fields.get("model", ""), "output": _output(turn, False), "usage": _usage(turn, False)}


def _ollama_events(fields: Json, turn: Turn) -> list[Json]:
    begun = _response(fields, "in_progress", [])
    events: list[Json] = [{"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}]
    index = 0
    if turn.thinking:
        events += _ollama_reasoning(turn)
        index += 1
    if turn.text:
        events += _ollama_text(turn, index)
        index += 1
    for number, call in enumerate(turn.calls, index):
        at = {"item_id": "fc_" + call.id, "output_index": number}
        events.append({"type": "response.output_item.added", "output_index": number, "item": _call_item(call, "in_progress")})
        events.append({"type": "response.function_call_arguments.delta", **at, "delta": call.written})
        events.append({"type": "response.function_call_arguments.done", **at, "arguments": call.written})
        events.append({"type": "response.output_item.done", "output_index": number, "item": _call_item(call)})
    whole = {**_response(fields, "completed", _output(turn, True)), "usage": _usage(turn, True), "completed_at": 1795900602}
    events.append({"type": "response.completed", "response": whole})
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _ollama_reasoning(turn: Turn) -> list[Json]:
    at = {"item_id": REASONING, "output_index": 0, "summary_index": 0}
    added = {"id": REASONING, "type": "reasoning", "summary": []}
    return [
        {"type": "response.output_item.added", "output_index": 0, "item": added},
        *({"type": "response.reasoning_summary_text.delta", **at, "delta": piece} for piece in turn.thinking),
        {"type": "response.reasoning_summary_text.done", **at, "text": "".join(turn.thinking)},
        {"type": "response.output_item.done", "output_index": 0, "item": _reasoning_item(turn, True)},
    ]


def _ollama_text(turn: Turn, index: int) -> list[Json]:
    text = "".join(turn.text)
    at = {"content_index": 0, "item_id": MESSAGE, "output_index": index}
    added = {"content": [], "id": MESSAGE, "role": "assistant", "status": "in_progress", "type": "message"}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": added},
        {"type": "response.content_part.added", **at, "part": _text_part("")},
        *({"type": "response.output_text.delta", **at, "delta": piece, "logprobs": []} for piece in turn.text),
        {"type": "response.output_text.done", **at, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **at, "part": _text_part(text)},
        {"type": "response.output_item.done", "output_index": index, "item": _message_item(turn)},
    ]


def _llamacpp_events(fields: Json, turn: Turn) -> list[Json]:
    """Without sequence numbers and indexes; all items are done at the end."""
    begun = {"id": ID, "object": "response", "status": "in_progress"}
    events: list[Json] = [{"type": "response.created", "response": begun}, {"type": "response.in_progress", "response": begun}]
    done: list[Json] = []
    if turn.thinking:
        item = {
            "id": REASONING,
            "summary": [],
            "type": "reasoning",
            "content": [],
            "encrypted_content": "",
            "status": "in_progress",
        }
        events.append({"type": "response.output_item.added", "item": item})
        events += [{"type": "response.reasoning_text.delta", "delta": piece, "item_id": REASONING} for piece in turn.thinking]
        done.append({"type": "response.output_item.done", "item": _reasoning_item(turn, False)})
    if turn.text:
        item = {"content": [], "id": MESSAGE, "role": "assistant", "status": "in_progress", "type": "message"}
        part = {"type": "output_text", "text": ""}
        events.append({"type": "response.output_item.added", "item": item})
        events.append({"type": "response.content_part.added", "item_id": MESSAGE, "part": part})
        events += [{"type": "response.output_text.delta", "item_id": MESSAGE, "delta": piece} for piece in turn.text]
        done.append({"type": "response.output_text.done", "item_id": MESSAGE, "text": "".join(turn.text)})
        done.append({"type": "response.content_part.done", "item_id": MESSAGE, "part": _text_part("".join(turn.text))})
        done.append({"type": "response.output_item.done", "item": _message_item(turn)})
    for call in turn.calls:
        events.append({"type": "response.output_item.added", "item": _call_item(call, "in_progress")})
        for piece in (call.written[:1], call.written[1:4], call.written[4:]):
            events.append({"type": "response.function_call_arguments.delta", "delta": piece, "item_id": "fc_" + call.id})
        done.append({"type": "response.output_item.done", "item": _call_item(call)})
    timings = {"cache_n": turn.cached, "prompt_n": turn.prompt - turn.cached, "predicted_n": turn.completion}
    completed = {"type": "response.completed", "response": _short(fields, turn), "timings": timings}
    return [*events, *done, completed]


def _begun(kind: str, text: str) -> list[bytes]:
    turn = Turn([], [text], [], 2, 0, False)
    events = _ollama_events({"model": "m"}, turn) if kind == "ollama" else _llamacpp_events({}, turn)
    return event_frames(events[:5])


def error_midway(kind: str, text: str = "It was a") -> list[Step]:
    """llama.cpp sends an error without a name; Ollama sends nothing more and ends the stream in order."""
    error = {"error": {"code": 500, "message": "slot unavailable", "type": "server_error"}}
    failed = [b"data: %b\n\n" % compact(error)] if kind == "openai" else []
    return stream([*_begun(kind, text), *failed])


def death_midway(kind: str, text: str = "It was a", how: How = "reset") -> list[Step]:
    last: Step = Reset() if how == "reset" else Close()
    head = Head(200, [("Content-Type", SSE)], chunked=True)
    return [head, *map(Piece, _begun(kind, text)), last]
