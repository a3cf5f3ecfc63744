"""Which calls can be translated for which backends."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.dialects.dialect import Call, Kind, Usage
from gateway.dialects.translation import (
    chat_answer,
    chat_request,
    completions,
    embeddings,
    messages_answer,
    messages_request,
    native_chat,
    native_embed,
    native_generate,
    responses_answer,
    responses_request,
)
from gateway.dialects.translation.conversation import Prompt, Reply
from gateway.dialects.translation.embeddings import Embedding
from gateway.dialects.translation.messages_stream import EventWriter
from gateway.dialects.translation.translation import Translation, Writer, inner_call
from gateway.dialects.translation.writers import Clock, EventsOfResponses, RecordsOfOllama, message_id

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ANY_KIND: frozenset[Kind] = frozenset({"ollama", "openai"})
OPENAI_KIND: frozenset[Kind] = frozenset({"openai"})

WriteReply = Callable[[Reply], dict[str, Any]]


@dataclass(frozen=True)
class Translator:
    """Translates calls of one path to `path`, for backends of these kinds.

    `translate` raises BadRequest for what the backend cannot be asked. `suits` tells whether a body asks for an answer at all.
    """

    path: str
    kinds: frozenset[Kind]
    translate: Callable[[Call, Kind], Translation]
    suits: Callable[[dict[str, Any]], bool] | None = None


def find(call: Call, kind: str) -> Translator | None:
    translator = TRANSLATORS.get(call.operation.path)
    if translator is None or kind not in translator.kinds:
        return None
    return translator if translator.suits is None or translator.suits(call.body) else None


def _chat(call: Call, prompt: Prompt, kind: Kind, write: WriteReply, writer: Writer) -> Translation:
    capabilities = call.entry.get("capabilities")
    thinks = isinstance(capabilities, list) and "thinking" in capabilities
    inner = inner_call(call, CHAT, chat_request.body_of(prompt, kind, thinks=thinks))
    dropped = prompt.dropped + chat_request.losses_of(prompt, kind, thinks=thinks)
    beginning = chat_request.beginning_of(prompt)
    stream = (chat_answer.ChunkReader(), writer)
    return Translation(inner, dropped, lambda answer: write(chat_answer.reply_of(answer, beginning)), stream)


def _messages(call: Call, kind: Kind) -> Translation:
    prompt = messages_request.read(call.body)
    model, reply_id, estimate = call.asked_model, message_id(), max(0, call.needs.prompt)

    def write(reply: Reply) -> dict[str, Any]:
        return messages_answer.write(reply, model, reply_id, estimate)

    return _chat(call, prompt, kind, write, EventWriter(model, reply_id, estimate))


def _responses(call: Call, kind: Kind) -> Translation:
    prompt = responses_request.read(call.body)
    estimate = max(0, call.needs.prompt)
    # The same for each backend that is tried, as the client may have the first events of an answer that then fails.
    response_id, created = call.reply = call.reply or (responses_answer.new_id(), int(time.time()))

    def write(reply: Reply) -> dict[str, Any]:
        if reply.usage.prompt_tokens is None:
            reply.usage = Usage(estimate, messages_answer.estimate_of(reply.parts))
        return responses_answer.write(reply, prompt, response_id, created)

    return _chat(call, prompt, kind, write, EventsOfResponses(prompt, estimate, response_id, created))


def _native_chat(call: Call, kind: Kind) -> Translation:
    clock = Clock()

    def write(reply: Reply) -> dict[str, Any]:
        return native_chat.write_chat(reply, call.asked_model, clock.now(), clock.durations())

    writer = RecordsOfOllama(native_chat.ChatWriter(call.asked_model))
    return _chat(call, native_chat.read_chat(call.body), kind, write, writer)


def _native_generate(call: Call, kind: Kind) -> Translation:
    clock, model = Clock(), call.asked_model
    wanted, is_raw = native_generate.read_generate(call.body), call.body.get("raw") is True

    def write(reply: Reply) -> dict[str, Any]:
        return native_generate.write_generate(reply, model, clock.now(), clock.durations(), raw=is_raw)

    writer = RecordsOfOllama(native_generate.GenerateWriter(model, raw=is_raw))
    if isinstance(wanted, Prompt):
        return _chat(call, wanted, kind, write, writer)
    inner = inner_call(call, COMPLETIONS, completions.completion_body_of(wanted, model))
    stream = (completions.CompletionReader(), writer)
    return Translation(inner, wanted.dropped, lambda answer: write(completions.completion_reply_of(answer)), stream)


def _embedding(call: Call, wanted: Embedding, write: Callable[[embeddings.Vectors], dict[str, Any]]) -> Translation:
    inner = inner_call(call, EMBEDDINGS, embeddings.embeddings_body_of(wanted, call.asked_model))
    texts = len(wanted.texts)
    return Translation(inner, wanted.dropped, lambda answer: write(embeddings.embeddings_reply_of(answer, texts)))


def _native_embed(call: Call, kind: Kind) -> Translation:
    clock = Clock()

    def write(vectors: embeddings.Vectors) -> dict[str, Any]:
        return native_embed.write_embed(vectors, call.asked_model, clock.durations())

    return _embedding(call, native_embed.read_embed(call.body), write)


def _native_embeddings(call: Call, kind: Kind) -> Translation:
    return _embedding(call, native_embed.read_embeddings(call.body), native_embed.write_embeddings)


def _has(name: str) -> Callable[[dict[str, Any]], bool]:
    """A request of Ollama's without this only loads or unloads its model."""
    return lambda body: bool(body.get(name))


TRANSLATORS: Mapping[str, Translator] = {
    "/v1/messages": Translator(CHAT, ANY_KIND, _messages),
    "/v1/responses": Translator(CHAT, ANY_KIND, _responses),
    "/api/chat": Translator(CHAT, OPENAI_KIND, _native_chat, _has("messages")),
    "/api/generate": Translator(CHAT, OPENAI_KIND, _native_generate, _has("prompt")),
    "/api/embed": Translator(EMBEDDINGS, OPENAI_KIND, _native_embed, _has("input")),
    "/api/embeddings": Translator(EMBEDDINGS, OPENAI_KIND, _native_embeddings, _has("prompt")),
}
