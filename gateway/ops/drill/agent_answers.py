"""The answers of a fake backend that has the APIs of coding agents, and the requests that these send."""

import json
from typing import Any

MESSAGES, RESPONSES = AGENTS = ("/v1/messages", "/v1/responses")
MOST_TOKENS = 50


def request_of(path: str, chat: dict[str, Any]) -> dict[str, Any]:
    """A request of the chat APIs as the API of this path has it."""
    if path == RESPONSES:
        return {"model": chat["model"], "input": chat["messages"][0]["content"], "stream": chat["stream"]}
    return {**chat, "max_tokens": MOST_TOKENS} if path == MESSAGES else chat


def frames(path: str, model: str, words: tuple[str, ...]) -> list[bytes]:
    events = _message_events(model, words) if path == MESSAGES else _response_events(model, words)
    return [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]


def whole(path: str, model: str, words: tuple[str, ...]) -> bytes:
    return json.dumps(_message(model, words) if path == MESSAGES else _response(model, words, "completed")).encode()


def _message(model: str, words: tuple[str, ...]) -> dict[str, Any]:
    content = [{"type": "text", "text": "".join(words)}] if words else []
    usage = {"input_tokens": 3, "output_tokens": len(words)}
    ending = {"stop_reason": "end_turn" if words else None, "stop_sequence": None, "usage": usage}
    return {"id": "msg_drill", "type": "message", "role": "assistant", "model": model, "content": content, **ending}


def _message_events(model: str, words: tuple[str, ...]) -> list[dict[str, Any]]:
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}} for word in words]
    return [
        {"type": "message_start", "message": _message(model, ())},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *deltas,
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": len(words)},
        },
        {"type": "message_stop"},
    ]


def _response(model: str, words: tuple[str, ...], status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": "".join(words), "annotations": []}
    item = {"id": "msg_drill", "type": "message", "role": "assistant", "status": status, "content": [part]}
    usage = {"input_tokens": 3, "output_tokens": len(words), "total_tokens": 3 + len(words)}
    head = {"id": "resp_drill", "object": "response", "created_at": 1767225600, "status": status, "model": model}
    return {**head, "output": [item] if words else [], "usage": usage if words else None}


def _response_events(model: str, words: tuple[str, ...]) -> list[dict[str, Any]]:
    place = {"item_id": "msg_drill", "output_index": 0, "content_index": 0}
    last = _response(model, words, "completed")
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": _response(model, (), "in_progress")},
        {"type": "response.output_item.added", "output_index": 0, "item": {**last["output"][0], "content": []}},
        *({"type": "response.output_text.delta", **place, "delta": word} for word in words),
        {"type": "response.output_text.done", **place, "text": "".join(words)},
        {"type": "response.output_item.done", "output_index": 0, "item": last["output"][0]},
        {"type": "response.completed", "response": last},
    ]
    return [{**event, "sequence_number": number} for number, event in enumerate(events)]
