"""The ollama package against the translation of its API, with a backend of the OpenAI API behind it."""

import asyncio
import base64
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import ollama
import pytest

from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects.dialect import Usage
from gateway.dialects.openai import ServerSentEvents
from gateway.dialects.translation import native_chat, native_generate
from gateway.dialects.translation.completions import Completion, CompletionReader, completion_body_of, completion_reply_of
from gateway.dialects.translation.conversation import (
    Counted,
    Event,
    Finished,
    Prompt,
    Reply,
    Text,
    TextPiece,
    Thinking,
    ThinkingPiece,
    ToolCall,
    ToolPiece,
    ToolResult,
)
from gateway.dialects.translation.embeddings import Vectors, embeddings_body_of, embeddings_reply_of
from gateway.dialects.translation.native_embed import read_embed, read_embeddings, write_embed, write_embeddings
from gateway.dialects.translation.native_records import Durations, RecordWriter, frame, timestamp
from tests.dialects.translation.native import PNG

NOW = timestamp(1_787_335_200_101_234_567)
TIMES = Durations(512, 41, 120, 60)
COUNTS = Usage(27, 3, 16)
ODD = "a\u2028b\u2029c\x85d\ne\x0b"
THOUGHT: list[Event] = [
    ThinkingPiece("Hm"),
    ThinkingPiece("."),
    TextPiece(ODD),
    TextPiece("!"),
    Finished("stop"),
    Counted(COUNTS),
]
CALLS: list[Event] = [
    ToolPiece(0, "call_a", "get_weather", '{"city": '),
    ToolPiece(1, "call_b", "get_weather", '{"city": "Rom"}'),
    ToolPiece(0, arguments='"Köln"}'),
    Finished("tool_calls"),
    Counted(COUNTS),
]


class Gateway:
    """Answers the ollama package, and keeps what the backend would be asked."""

    def __init__(self, events: Sequence[Event] = (), backend: Callable[[dict[str, Any]], Any] | None = None) -> None:
        self.events, self.backend = events, backend
        self.asked: list[Any] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        body = strict_json.read_object(request.content)
        try:
            return self._answers[request.url.path](self, body, body["model"])
        except BadRequest as refusal:
            return httpx.Response(refusal.status, json={"error": refusal.message})

    def _chat(self, body: dict[str, Any], model: str) -> httpx.Response:
        if native_chat.is_load(body):
            return _whole(native_chat.load_answer(body, model, NOW))
        prompt = native_chat.read_chat(body)
        self.asked.append(prompt)
        if prompt.stream:
            return _stream(native_chat.ChatWriter(model), self.events)
        return _whole(native_chat.write_chat(_reply(self.events), model, NOW, TIMES))

    def _generate(self, body: dict[str, Any], model: str) -> httpx.Response:
        if native_generate.is_load(body):
            return _whole(native_generate.load_answer(body, model, NOW))
        found = native_generate.read_generate(body)
        self.asked.append(found)
        if isinstance(found, Prompt):
            if found.stream:
                return _stream(native_generate.GenerateWriter(model), self.events)
            return _whole(native_generate.write_generate(_reply(self.events), model, NOW, TIMES))
        return self._complete(found, model)

    def _complete(self, completion: Completion, model: str) -> httpx.Response:
        assert self.backend is not None
        answer = self.backend(completion_body_of(completion, model))
        if not completion.stream:
            return _whole(native_generate.write_generate(completion_reply_of(answer), model, NOW, raw=True))
        reader = CompletionReader()
        payloads = ServerSentEvents().payloads(answer)[:-1]
        events = [event for payload in payloads for event in reader.read(strict_json.read_loosely(payload))] + reader.end()
        return _stream(native_generate.GenerateWriter(model, raw=True), events)

    def _embed(self, body: dict[str, Any], model: str) -> httpx.Response:
        return _whole(write_embed(self._vectors(embeddings_body_of(read_embed(body), model)), model, TIMES))

    def _embeddings(self, body: dict[str, Any], model: str) -> httpx.Response:
        return _whole(write_embeddings(self._vectors(embeddings_body_of(read_embeddings(body), model))))

    def _vectors(self, body: dict[str, Any]) -> Vectors:
        self.asked.append(body)
        if not body["input"]:
            return Vectors([])
        assert self.backend is not None
        return embeddings_reply_of(self.backend(body), len(body["input"]))

    _answers = {  # noqa: RUF012
        "/api/chat": _chat,
        "/api/generate": _generate,
        "/api/embed": _embed,
        "/api/embeddings": _embeddings,
    }


def _whole(record: dict[str, Any]) -> httpx.Response:
    return httpx.Response(200, content=strict_json.write(record), headers={"content-type": "application/json"})


def _stream(writer: RecordWriter, events: Sequence[Event]) -> httpx.Response:
    """In chunks of seven bytes, as networks cut where they like."""
    data = b"".join(_frames(writer, events))
    chunks = [data[start : start + 7] for start in range(0, len(data), 7)]
    return httpx.Response(200, stream=_Chunks(chunks), headers={"content-type": "application/x-ndjson"})


class _Chunks(httpx.SyncByteStream, httpx.AsyncByteStream):
    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.chunks)

    async def __aiter__(self) -> Any:
        for chunk in self.chunks:
            yield chunk


def _frames(writer: RecordWriter, events: Sequence[Event]) -> Iterator[bytes]:
    for event in events:
        yield writer.write(event, NOW)
    yield writer.end(NOW, TIMES)


def _reply(events: Sequence[Event]) -> Reply:
    reply, calls = Reply([], "stop"), dict[int, ToolCall]()
    for event in events:
        if isinstance(event, TextPiece):
            reply.parts.append(Text(event.text))
        elif isinstance(event, ThinkingPiece):
            reply.parts.append(Thinking(event.text))
        elif isinstance(event, ToolPiece):
            before = calls.get(event.index, ToolCall(event.id, event.name, ""))
            calls[event.index] = ToolCall(before.id, before.name, before.arguments + event.arguments)
        elif isinstance(event, Finished):
            reply.finish = event.finish
        else:
            reply.usage = event.usage
    reply.parts += calls.values()
    return reply


def client(gateway: Gateway) -> ollama.Client:
    return ollama.Client("http://gateway", transport=httpx.MockTransport(gateway))


def use(gateway: Gateway, call: str, *, asynchronous: bool, stream: bool, **fields: Any) -> list[Any]:
    """The answers of one call: those of a stream, or the one that is whole."""
    if not asynchronous:
        found = getattr(client(gateway), call)("m", stream=stream, **fields)
        return list(found) if stream else [found]

    async def answers() -> list[Any]:
        found = await getattr(ollama.AsyncClient("http://gateway", transport=httpx.MockTransport(gateway)), call)(
            "m", stream=stream, **fields
        )
        return [answer async for answer in found] if stream else [found]

    return asyncio.run(answers())


each_way = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
streamed_or_whole = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
MESSAGES = [{"role": "user", "content": "Say hi"}]


def assert_counted(last: Any) -> None:
    assert (last.done, last.done_reason) == (True, "stop")
    assert (last.total_duration, last.load_duration, last.prompt_eval_duration, last.eval_duration) == TIMES
    assert (last.prompt_eval_count, last.eval_count) == (27, 3)


@each_way
@streamed_or_whole
def test_chat(asynchronous: bool, stream: bool) -> None:
    answers = use(Gateway(THOUGHT), "chat", asynchronous=asynchronous, stream=stream, messages=MESSAGES)
    assert "".join(answer.message.content for answer in answers) == ODD + "!"
    assert "".join(answer.message.thinking or "" for answer in answers) == "Hm."
    assert all(answer.created_at == NOW and answer.model == "m" for answer in answers)
    assert [answer.done for answer in answers] == [False] * (len(answers) - 1) + [True]
    assert len(answers) == (5 if stream else 1)
    assert_counted(answers[-1])


@each_way
@streamed_or_whole
def test_generate(asynchronous: bool, stream: bool) -> None:
    answers = use(Gateway(THOUGHT), "generate", asynchronous=asynchronous, stream=stream, prompt="Say hi", think=True)
    assert "".join(answer.response for answer in answers) == ODD + "!"
    assert "".join(answer.thinking or "" for answer in answers) == "Hm."
    assert answers[-1]["context"] == []
    assert_counted(answers[-1])


def get_weather(city: str) -> str:
    """
    The weather of a city.

    Args:
      city: its name
    """
    return f"mild in {city}"


@each_way
@streamed_or_whole
def test_a_conversation_with_tools(asynchronous: bool, stream: bool) -> None:
    gateway = Gateway(CALLS)
    messages: list[Any] = [{"role": "user", "content": "Köln or Rom?"}]
    answers = use(gateway, "chat", asynchronous=asynchronous, stream=stream, messages=messages, tools=[get_weather])
    calls = [call for answer in answers for call in answer.message.tool_calls or ()]
    assert [(call.function.name, call.function.arguments) for call in calls] == [
        ("get_weather", {"city": "Köln"}),
        ("get_weather", {"city": "Rom"}),
    ]
    messages += [answer.message for answer in answers if answer.message.tool_calls]
    messages += [
        {"role": "tool", "content": get_weather(**call.function.arguments), "tool_name": call.function.name} for call in calls
    ]
    use(gateway, "chat", asynchronous=asynchronous, stream=stream, messages=messages, tools=[get_weather])
    first, second = gateway.asked
    assert first.tools[0].schema["properties"] == {"city": {"type": "string", "description": "its name"}}
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[1].parts == (
        ToolCall("call00001", "get_weather", '{"city":"Köln"}'),
        ToolCall("call00002", "get_weather", '{"city":"Rom"}'),
    )
    assert second.messages[2].parts == (
        ToolResult("call00001", (Text("mild in Köln"),)),
        ToolResult("call00002", (Text("mild in Rom"),)),
    )


@each_way
def test_broken_tool_calls_are_an_error_in_the_stream(asynchronous: bool) -> None:
    gateway = Gateway([TextPiece("x"), ToolPiece(0, "a", "f", "{"), Finished("tool_calls")])
    with pytest.raises(ollama.ResponseError, match="the tool 'f'"):
        use(gateway, "chat", asynchronous=asynchronous, stream=True, messages=MESSAGES)


@each_way
def test_a_stream_that_is_cut_short_is_an_error(asynchronous: bool) -> None:
    with pytest.raises(ollama.ResponseError, match="ended early"):
        use(Gateway([TextPiece("x")]), "chat", asynchronous=asynchronous, stream=True, messages=MESSAGES)


@pytest.mark.parametrize("think, effort", [(None, None), (True, "medium"), (False, "none"), ("low", "low")])
def test_thinking(think: Any, effort: str | None) -> None:
    gateway = Gateway(THOUGHT)
    client(gateway).chat("m", MESSAGES, think=think)
    assert gateway.asked[0].effort == effort


def test_formats_images_and_options() -> None:
    gateway = Gateway(THOUGHT)
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "string"}}}
    image = base64.b64decode(PNG)
    options = ollama.Options(temperature=0, num_predict=-1, num_ctx=8192, stop=["\n"])
    client(gateway).chat(
        "m", [{"role": "user", "content": "x", "images": [image]}], format=schema, options=options, keep_alive="5m"
    )
    client(gateway).generate("m", "x", format="json", images=[image])
    asked, generated = gateway.asked
    assert asked.format.schema == schema
    assert generated.format.schema is None
    assert asked.messages[0].parts[0] == generated.messages[0].parts[0]
    assert (asked.messages[0].parts[0].media_type, asked.messages[0].parts[0].data) == ("image/png", PNG)
    assert (asked.sampling, asked.most_output, asked.stop) == ({"temperature": 0.0}, None, ("\n",))
    assert asked.dropped == ["keep_alive", "options.num_ctx"]


def test_refusals() -> None:
    gateway = Gateway(THOUGHT)
    with pytest.raises(ollama.ResponseError, match="'logprobs'") as refusal:
        client(gateway).chat("m", MESSAGES, logprobs=True)
    assert refusal.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="'template'"):
        client(gateway).generate("m", "x", template="{{ .Prompt }}")
    with pytest.raises(ollama.ResponseError, match="'context'"):
        list(client(gateway).generate("m", "x", context=[1, 2], stream=True))


@each_way
@streamed_or_whole
def test_models_are_loaded_and_unloaded(asynchronous: bool, stream: bool) -> None:
    (loaded,) = use(Gateway(), "chat", asynchronous=asynchronous, stream=stream, messages=[])
    (unloaded,) = use(Gateway(), "generate", asynchronous=asynchronous, stream=stream, keep_alive=0)
    assert (loaded.done, loaded.done_reason, loaded.message.content) == (True, "load", "")
    assert (unloaded.done, unloaded.done_reason, unloaded.response) == (True, "unload", "")


CHUNKS = (
    b"".join(
        b"data: " + json.dumps(chunk).encode() + b"\n\n"
        for chunk in (
            {"choices": [{"index": 0, "text": "return", "finish_reason": None}]},
            {"choices": [{"index": 0, "text": " x", "finish_reason": "stop"}]},
            {"choices": [], "usage": {"prompt_tokens": 27, "completion_tokens": 3}},
        )
    )
    + b"data: [DONE]\n\n"
)
WHOLE = {
    "choices": [{"index": 0, "text": "return x", "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 27, "completion_tokens": 3},
}


@each_way
@streamed_or_whole
@pytest.mark.parametrize("fields", [{"raw": True}, {"suffix": "\n"}], ids=["raw", "suffix"])
def test_completions(asynchronous: bool, stream: bool, fields: dict[str, Any]) -> None:
    asked: list[dict[str, Any]] = []

    def backend(body: dict[str, Any]) -> Any:
        asked.append(body)
        return CHUNKS if body.get("stream") else WHOLE

    answers = use(Gateway(backend=backend), "generate", asynchronous=asynchronous, stream=stream, prompt="def f(x): ", **fields)
    assert "".join(answer.response for answer in answers) == "return x"
    assert (answers[-1].done_reason, answers[-1].prompt_eval_count, answers[-1].eval_count) == ("stop", 27, 3)
    assert asked[0]["prompt"] == "def f(x): "
    assert asked[0].get("suffix") == fields.get("suffix")


def _embedded(body: dict[str, Any]) -> dict[str, Any]:
    vectors = [[float(len(text)), 0.5] for text in body["input"]]
    packed = [base64.b64encode(struct.pack("<2f", *vector)).decode() for vector in vectors]
    data = [{"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(packed)]
    return {"object": "list", "data": data[::-1], "model": body["model"], "usage": {"prompt_tokens": 8, "total_tokens": 8}}


@each_way
def test_embeddings(asynchronous: bool) -> None:
    gateway = Gateway(backend=_embedded)
    transport = httpx.MockTransport(gateway)

    async def ask() -> tuple[Any, Any, Any]:
        them = ollama.AsyncClient("http://gateway", transport=transport)
        return (
            await them.embed("m", ["a", "bb"], dimensions=2),
            await them.embed("m", "ccc"),
            await them.embeddings("m", "dddd"),
        )

    it = client(gateway)
    several, one, older = (
        asyncio.run(ask())
        if asynchronous
        else (it.embed("m", ["a", "bb"], dimensions=2), it.embed("m", "ccc"), it.embeddings("m", "dddd"))
    )
    assert several.embeddings == [[1.0, 0.5], [2.0, 0.5]]
    assert (several.model, several.prompt_eval_count, several.total_duration) == ("m", 8, 512)
    assert one.embeddings == [[3.0, 0.5]]
    assert older.embedding == [4.0, 0.5]
    assert gateway.asked[0] == {"model": "m", "input": ["a", "bb"], "encoding_format": "float", "dimensions": 2}


def test_embedding_nothing() -> None:
    assert client(Gateway()).embed("m", []).embeddings == []
    assert client(Gateway()).embeddings("m", "").embedding == []


def test_a_frame_is_one_line_to_the_package() -> None:
    assert len(frame({"error": ODD}).decode().splitlines()) == 1
