"""A model for coding agents, played by a fake backend: it calls the tools of a plan, one a turn, and ends with a text.

It is played on each route that agents reach: chat/completions of a strict server, and Ollama's /v1/messages and /v1/responses.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tests.support import strict_chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Received, Script, Step, answer, compact, sse, stream

Json = dict[str, Any]
USAGE = {"prompt_tokens": 120, "completion_tokens": 8, "total_tokens": 128, "prompt_tokens_details": {"cached_tokens": 100}}
CREATED = 1787335200


@dataclass(frozen=True)
class Call:
    tool: str
    arguments: Json

    @property
    def halves(self) -> tuple[str, str]:
        text = json.dumps(self.arguments)
        return text[: len(text) // 2], text[len(text) // 2 :]


@dataclass(frozen=True)
class Plan:
    calls: tuple[Call, ...]
    thought: str = "I look first."
    text: str = "All is done."

    def call(self, results: int, tools: Iterable[str]) -> Call | None:
        """What is called when the conversation has the results of so many calls; None is the end."""
        call = self.calls[results] if results < len(self.calls) else None
        return call if call and call.tool in tools else None


def play_strict_chat(backend: FakeBackend, plan: Plan) -> None:
    backend.play("/v1/chat/completions", _chat(plan))


def play_native(backend: FakeBackend, plan: Plan) -> None:
    """As an Ollama that has the routes of both agents."""
    play_strict_chat(backend, plan)
    backend.play("/v1/messages", _messages(plan))
    backend.play("/v1/responses", _responses(plan))


def _chat(plan: Plan) -> Script:
    def respond(request: Received) -> list[Step]:
        body = request.json
        if problem := strict_chat.problem_of(body):
            return answer(400, {"error": {"message": problem, "type": "BadRequestError", "param": None, "code": 400}})
        results = sum(message["role"] == "tool" for message in body["messages"])
        call = plan.call(results, [tool["function"]["name"] for tool in body.get("tools", [])])
        head = {"id": f"chatcmpl-{results}", "created": CREATED, "model": body["model"]}
        if not body.get("stream"):
            return answer(200, _whole_chat(plan, call, head, results))
        return stream(sse(_chunks(plan, call, head, results)))

    return respond


def _whole_chat(plan: Plan, call: Call | None, head: Json, results: int) -> Json:
    message: Json = {"role": "assistant", "content": plan.text}
    if call:
        function = {"name": call.tool, "arguments": "".join(call.halves)}
        message = {"role": "assistant", "content": None, "tool_calls": [_chat_call(results, function)]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if call else "stop"}
    return {**head, "object": "chat.completion", "choices": [choice], "usage": USAGE}


def _chat_call(results: int, function: Json) -> Json:
    return {"id": f"call_{results}", "type": "function", "function": function}


def _chunks(plan: Plan, call: Call | None, head: Json, results: int) -> list[Json]:
    deltas: list[Json] = [{"role": "assistant", "content": ""}, {"reasoning": plan.thought}]
    if call:
        first, second = call.halves
        deltas.append({"tool_calls": [{"index": 0, **_chat_call(results, {"name": call.tool, "arguments": ""})}]})
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": half}}]} for half in (first, second)]
    else:
        deltas += [{"content": plan.text[:4]}, {"content": plan.text[4:]}]
    choices: list[Json] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": {}, "finish_reason": "tool_calls" if call else "stop"})
    chunk = {**head, "object": "chat.completion.chunk"}
    return [*({**chunk, "choices": [choice]} for choice in choices), {**chunk, "choices": [], "usage": USAGE}]


def _messages(plan: Plan) -> Script:
    def respond(request: Received) -> list[Step]:
        body = request.json if isinstance(request.json, dict) else {}
        if not body.get("model") or body.get("max_tokens", 0) < 1 or not body.get("messages"):
            words = "max_tokens is required and must be positive"
            return answer(400, {"type": "error", "error": {"type": "invalid_request_error", "message": words}})
        results = json.dumps(body["messages"]).count('"tool_result"')
        call = plan.call(results, [tool["name"] for tool in body.get("tools", [])])
        last: Json = {"type": "text", "text": plan.text}
        if call:
            last = {"type": "tool_use", "id": f"toolu_{results}", "name": call.tool, "input": call.arguments}
        blocks: list[Json] = [{"type": "thinking", "thinking": plan.thought}, last]
        message: Json = {"id": f"msg_{results}", "type": "message", "role": "assistant", "model": body["model"], "content": []}
        end: Json = {"stop_reason": "tool_use" if call else "end_turn"}
        usage = {"input_tokens": 120, "output_tokens": 8}
        if not body.get("stream"):
            return answer(200, {**message, "content": blocks, **end, "usage": usage})
        events: list[Json] = [
            {"type": "message_start", "message": {**message, "usage": {"input_tokens": 100, "output_tokens": 0}}}
        ]
        events += [event for index, block in enumerate(blocks) for event in _block_events(index, block)]
        events += [{"type": "message_delta", "delta": end, "usage": usage}, {"type": "message_stop"}]
        return stream(_named(events))

    return respond


def _block_events(index: int, block: Json) -> list[Json]:
    kind = block["type"]
    if kind == "tool_use":
        start, delta = {**block, "input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
    else:
        field = "text" if kind == "text" else "thinking"
        start, delta = {"type": kind, field: ""}, {"type": f"{field}_delta", field: block[field]}
    return [
        {"type": "content_block_start", "index": index, "content_block": start},
        {"type": "content_block_delta", "index": index, "delta": delta},
        {"type": "content_block_stop", "index": index},
    ]


def _responses(plan: Plan) -> Script:
    def respond(request: Received) -> list[Step]:
        body = request.json if isinstance(request.json, dict) else {}
        if not body.get("model") or not body.get("input"):
            return answer(400, {"error": {"message": "input is required", "type": "invalid_request_error"}})
        items = body["input"] if isinstance(body["input"], list) else []
        results = sum(item.get("type", "").endswith("_output") for item in items)
        call = plan.call(results, [tool.get("name", "") for tool in body.get("tools", [])])
        last: Json = {"id": f"msg_{results}", "type": "message", "role": "assistant"}
        if call:
            arguments = json.dumps(call.arguments)
            last = {"id": f"fc_{results}", "type": "function_call", "call_id": f"call_{results}", "name": call.tool}
            last["arguments"] = arguments
        else:
            last["content"] = [{"type": "output_text", "text": plan.text, "annotations": []}]
        output = [{"id": f"rs_{results}", "type": "reasoning", "summary": [{"type": "summary_text", "text": plan.thought}]}]
        return _answered(body, f"resp_{results}", [*output, {**last, "status": "completed"}])

    return respond


def _answered(body: Json, name: str, output: list[Json]) -> list[Step]:
    head = {"id": name, "object": "response", "created_at": CREATED, "status": "in_progress", "model": body["model"]}
    usage = {"input_tokens": 120, "output_tokens": 8, "total_tokens": 128}
    details = {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
    completed = {**head, "status": "completed", "output": output, "usage": {**usage, **details}}
    if not body.get("stream"):
        return answer(200, completed)
    started = {**head, "output": [], "usage": None}
    events: list[Json] = [{"type": f"response.{word}", "response": started} for word in ("created", "in_progress")]
    for index, item in enumerate(output):
        events.append({"type": "response.output_item.added", "output_index": index, "item": {**item, "status": "in_progress"}})
        if item["type"] == "message":
            place = {"item_id": item["id"], "output_index": index, "content_index": 0}
            events.append({"type": "response.output_text.delta", **place, "delta": item["content"][0]["text"]})
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    events.append({"type": "response.completed", "response": completed})
    return stream(_named([{**event, "sequence_number": number} for number, event in enumerate(events)]))


def _named(events: list[Json]) -> list[bytes]:
    return [b"event: %s\ndata: %s\n\n" % (event["type"].encode(), compact(event)) for event in events]
