"""Any chunks of a backend become a stream that the client's official package reads, or that ends with an error."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import httpx2
import ollama
import openai
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import BackendFailed
from gateway.dialects.translation import native_chat, responses_answer, responses_request
from gateway.dialects.translation.chat_answer import ChunkReader
from gateway.dialects.translation.conversation import Event
from gateway.dialects.translation.messages_stream import EventWriter
from gateway.dialects.translation.unreadable import Unreadable
from tests.dialects.translation.native import NOW
from tests.dialects.translation.test_messages_answer import check_protocol
from tests.dialects.translation.test_messages_answer import client as anthropic_client
from tests.dialects.translation.valid_requests import QUICK

JSON = dict[str, Any]
ASKED: Any = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
SHORT = st.text('ab{}"\\:1 \ud800é', max_size=4)
ARGUMENTS = st.sampled_from(["", "{}", "{", "}", '{"a":', "1}", '{"a":1}', " ", "null", "[]", '"'])
CALLS = st.fixed_dictionaries(
    {},
    optional={
        "index": st.integers(0, 2) | st.none(),
        "id": st.sampled_from(["", "c1", "c2"]) | st.none(),
        "type": st.just("function"),
        "function": st.fixed_dictionaries(
            {}, optional={"name": st.sampled_from(["", "weather", "patch"]) | st.none(), "arguments": ARGUMENTS | st.none()}
        ),
    },
)
DELTAS = st.fixed_dictionaries(
    {},
    optional={
        "content": SHORT | st.none(),
        "reasoning": SHORT,
        "reasoning_content": SHORT,
        "tool_calls": st.lists(CALLS, max_size=2),
        "role": st.just("assistant"),
    },
)
COUNTS = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
CHUNKS = st.fixed_dictionaries(
    {
        "choices": st.lists(
            st.fixed_dictionaries(
                {"index": st.integers(0, 1), "delta": DELTAS},
                optional={"finish_reason": st.sampled_from([None, "stop", "length", "tool_calls", "content_filter", "abort"])},
            ),
            max_size=1,
        )
    },
    optional={"usage": st.just(COUNTS) | st.none()},
)
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, [], {"error": {"message": "no"}}, {"choices": 1}, {"choices": [{"delta": 1}]}]
)
PLAIN = st.lists(CHUNKS, min_size=1, max_size=8)
STREAMS = PLAIN | st.tuples(PLAIN, ODD, PLAIN).map(lambda found: [*found[0], found[1], *found[2]])
LAST = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
ENDS = st.sampled_from([[], [LAST]])


def events_of(chunks: list[Any], fail: Callable[[BackendFailed], bytes]) -> Iterator[Event | bytes]:
    """The events, and the frames of an error if a chunk cannot be read."""
    reader = ChunkReader()
    try:
        for chunk in chunks:
            yield from reader.read(chunk)
        if chunks[-1:] == [LAST]:
            yield from reader.end()
    except Unreadable as wrong:
        yield fail(BackendFailed(str(wrong)))


def kinds_in(stream: bytes) -> list[str]:
    return [line.removeprefix(b"event: ").decode() for line in stream.split(b"\n") if line.startswith(b"event: ")]


@QUICK
@given(STREAMS, ENDS)
def test_anthropic(chunks: list[Any], end: list[Any]) -> None:
    writer = EventWriter("m", "msg_1", 5)
    events = events_of([*chunks, *end], lambda error: writer.error("api_error", error.message))
    frames = [writer.start(), *(event if isinstance(event, bytes) else writer.write(event) for event in events), writer.end()]
    frames = [frame for frame in frames if frame]
    check_protocol(frames)
    has_failed = kinds_in(b"".join(frames))[-1] == "error"
    assert has_failed == bool(writer.failure)
    try:
        with anthropic_client(frames).messages.stream(**ASKED, max_tokens=9) as stream:
            message = stream.get_final_message()
    except anthropic.APIStatusError:
        assert has_failed
        return
    assert not has_failed
    assert message.stop_reason is not None and message.content
    assert all(isinstance(block.input, dict) for block in message.content if block.type == "tool_use")


@QUICK
@given(STREAMS, ENDS)
def test_openai(chunks: list[Any], end: list[Any]) -> None:
    tools: Any = [{"type": "custom", "name": "patch"}, {"type": "function", "name": "weather", "parameters": {}}]
    prompt = responses_request.read({"model": "m", "input": "Hi", "tools": tools})
    writer = responses_answer.EventWriter(prompt, created=7)
    events = events_of([*chunks, *end], writer.fail)
    frames = [writer.start(), *(event if isinstance(event, bytes) else writer.write(event) for event in events), writer.end()]
    kinds = kinds_in(b"".join(frames))
    assert kinds[-1] in ("response.completed", "response.incomplete", "response.failed")
    assert not {"error", "response.failed", "response.completed", "response.incomplete"} & set(kinds[:-2])
    answer = httpx2.Response(200, content=b"".join(frames), headers={"content-type": "text/event-stream"})
    http = httpx2.Client(transport=httpx2.MockTransport(lambda request: answer))
    client = openai.OpenAI(api_key="k", base_url="http://gateway.test/v1", http_client=http, max_retries=0)
    try:
        with client.responses.stream(model="m", input="Hi") as stream:
            *_, last = stream
    except openai.APIError:
        assert kinds[-2:] == ["error", "response.failed"]
        return
    assert last.type == kinds[-1]
    assert last.type in ("response.completed", "response.incomplete") and last.response.usage is not None


@QUICK
@given(STREAMS, ENDS)
def test_ollama(chunks: list[Any], end: list[Any]) -> None:
    writer = native_chat.ChatWriter("m")
    events = events_of([*chunks, *end], writer.fail)
    frames = [*(event if isinstance(event, bytes) else writer.write(event, NOW) for event in events), writer.end(NOW)]
    records = [json.loads(line) for line in b"".join(frames).splitlines()]
    assert all("error" not in record and record["done"] is False for record in records[:-1])
    answer = httpx.Response(200, content=b"".join(frames), headers={"content-type": "application/x-ndjson"})
    client = ollama.Client("http://gateway", transport=httpx.MockTransport(lambda request: answer))
    try:
        found = list(client.chat("m", ASKED["messages"], stream=True))
    except ollama.ResponseError:
        assert "error" in records[-1]
        return
    assert found[-1].done is True and found[-1].done_reason in ("stop", "length")
