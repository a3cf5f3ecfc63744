"""Answers that the gateway gives itself where no backend of a model has the route, or need not be asked."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from gateway.dialects.dialect import Call
from gateway.dialects.model_entries import context_of
from gateway.dialects.translation import native_chat, native_fields, native_generate
from gateway.dialects.translation.native_records import timestamp
from gateway.fleet.catalog import Model

ESTIMATED = ((b"x-gateway-estimated", b"true"),)


class LocalAnswer(NamedTuple):
    """`headers` are added to the response."""

    value: dict[str, Any]
    headers: Sequence[tuple[bytes, bytes]] = ()


# None if there is no such answer to a call.
AnswerHere = Callable[[Model, Call], LocalAnswer | None]


def show(model: Model, call: Call) -> LocalAnswer:
    """`POST /api/show` for a model that only OpenAI-compatible servers have: they have no such route.

    Unknown facts are left empty, never invented.
    """
    info: dict[str, Any] = {"general.architecture": "unknown"}
    if length := context_of(model.openai):
        info["unknown.context_length"] = length
    return LocalAnswer(
        {
            "modelfile": "",
            "parameters": "",
            "template": "",
            "details": model.native["details"],
            "model_info": info,
            "capabilities": model.native.get("capabilities") or ["completion"],
            "modified_at": model.native["modified_at"],
        }
    )


def load_chat(model: Model, call: Call) -> LocalAnswer | None:
    """Other servers than Ollama have their models loaded; a request to load one is answered at once."""
    is_load = native_chat.is_load(call.body)
    return LocalAnswer(native_chat.load_answer(call.body, call.asked_model, timestamp(time.time_ns()))) if is_load else None


def load_generate(model: Model, call: Call) -> LocalAnswer | None:
    is_load = native_generate.is_load(call.body)
    return LocalAnswer(native_generate.load_answer(call.body, call.asked_model, timestamp(time.time_ns()))) if is_load else None


def unload(model: Model, call: Call) -> LocalAnswer | None:
    """The answer to a request to unload a model, from a caller that does not manage models: it stays loaded for others."""
    answer_here = LOADS.get(call.operation.path)
    if answer_here is None or not native_fields.unloads(call.body):
        return None
    if (answer := answer_here(model, call)) is not None:
        call.drop(["keep_alive"])
    return answer


def load_embed(model: Model, call: Call) -> LocalAnswer | None:
    return None if call.body.get("input") else LocalAnswer({"model": call.asked_model, "embeddings": []})


def load_embeddings(model: Model, call: Call) -> LocalAnswer | None:
    return None if call.body.get("prompt") else LocalAnswer({"embedding": []})


def count_messages(model: Model, call: Call) -> LocalAnswer:
    return LocalAnswer({"input_tokens": call.estimate}, ESTIMATED)


def count_responses(model: Model, call: Call) -> LocalAnswer:
    return LocalAnswer({"object": "response.input_tokens", "input_tokens": call.estimate}, ESTIMATED)


LOADS: Mapping[str, AnswerHere] = {
    "/api/chat": load_chat,
    "/api/generate": load_generate,
    "/api/embed": load_embed,
    "/api/embeddings": load_embeddings,
}
ANSWERS: Mapping[str, AnswerHere] = {
    **LOADS,
    "/api/show": show,
    "/v1/messages/count_tokens": count_messages,
    "/v1/responses/input_tokens": count_responses,
}
