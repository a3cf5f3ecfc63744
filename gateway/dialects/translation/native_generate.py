"""Ollama's /api/generate as a client's dialect: a prompt becomes a chat, a raw prompt or one with a suffix a completion."""

from gateway.core.errors import BadRequest
from gateway.dialects.fields import boolean, expect
from gateway.dialects.translation import native_fields as fields
from gateway.dialects.translation.completions import Completion
from gateway.dialects.translation.conversation import Message, Prompt, Reply, Text
from gateway.dialects.translation.native_records import (
    UNTIMED,
    Durations,
    Fields,
    RecordWriter,
    last_fields,
    load_record,
    whole_content,
)

# Clients that read the last record's tokens, to send them back, get none: no server of the OpenAI API has them.
NO_CONTEXT: Fields = {"context": []}


def is_load(body: Fields) -> bool:
    """Whether a request only loads or unloads its model; `load_answer` answers it."""
    return not body.get("prompt")


def load_answer(body: Fields, model: str, created_at: str) -> Fields:
    return load_record(body, model, created_at, _content)


def read_generate(body: Fields) -> Prompt | Completion:
    """Raises BadRequest on what cannot be read, and on what the model's server cannot do."""
    for name in ("prompt", "system", "suffix", "template"):
        expect(body, name, str, "a string")
    expect(body, "context", list, "a list")
    fields.refuse_lost_fields(body)
    raw = boolean(body, "raw", default=False)
    if raw and (body.get("template") or body.get("system") or body.get("context")):
        raise BadRequest("the field 'raw' cannot be combined with 'template', 'system' or 'context'")
    if body.get("template"):
        raise BadRequest("the field 'template' is not taken for this model; send 'raw' with a whole prompt")
    if body.get("context"):
        raise BadRequest("the field 'context' is not taken for this model; send earlier messages to /api/chat")
    return _completion(body, raw=raw) if raw or body.get("suffix") else _prompt(body)


def write_generate(reply: Reply, model: str, created_at: str, durations: Durations = UNTIMED, *, raw: bool = False) -> Fields:
    """Raises BackendFailed if the model called a tool with arguments that are not an object."""
    last = last_fields(reply.finish, reply.usage, durations, {} if raw else NO_CONTEXT)
    return {"model": model, "created_at": created_at, **whole_content(reply, _content), **last}


class GenerateWriter(RecordWriter):
    def __init__(self, model: str, *, raw: bool = False) -> None:
        super().__init__(model, _content, {} if raw else NO_CONTEXT)


def _content(text: str, thinking: str, calls: list[Fields]) -> Fields:
    content: Fields = {"response": text}
    if thinking:
        content["thinking"] = thinking
    if calls:
        content["tool_calls"] = calls
    return content


def _prompt(body: Fields) -> Prompt:
    options, images, text = fields.options_of(body), fields.images_of(body, "the request"), Text(body.get("prompt") or "")
    system = [Message("system", (Text(body["system"]),))] if body.get("system") else []
    return Prompt(
        messages=[*system, Message("user", (*images, text))],
        most_output=fields.most_output_of(options),
        stop=fields.stop_of(options),
        sampling=fields.sampling_of(options),
        effort=fields.effort_of(body),
        format=fields.format_of(body),
        stream=boolean(body, "stream", default=True),
        dropped=fields.dropped_of(body, "top_logprobs"),
    )


def _completion(body: Fields, *, raw: bool) -> Completion:
    """Ollama, too, uses no suffix in a raw prompt and no system prompt around a gap, and never thinks there."""
    for name in ("images", "format"):
        if body.get(name):
            raise BadRequest(f"the field {name!r} cannot be combined with {'raw' if raw else 'suffix'!r} for this model")
    options = fields.options_of(body)
    return Completion(
        body.get("prompt") or "",
        suffix="" if raw else body["suffix"],
        most_output=fields.most_output_of(options),
        stop=fields.stop_of(options),
        sampling=fields.sampling_of(options),
        stream=boolean(body, "stream", default=True),
        dropped=fields.dropped_of(body, "top_logprobs", "think", "suffix" if raw else "system"),
    )
