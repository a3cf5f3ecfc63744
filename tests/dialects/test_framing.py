"""Streams are cut into frames: server-sent events and lines of JSON."""

import json

import pytest

from gateway.dialects.anthropic import MessageEvents
from gateway.dialects.dialect import Framing
from gateway.dialects.ollama import Ndjson
from gateway.dialects.openai import ServerSentEvents
from gateway.dialects.responses import ResponseEvents


@pytest.mark.parametrize(
    ("data", "end", "payloads"),
    [
        (b"data: 1\n\ndata: 2", 9, [b"1"]),
        (b"data: 1\r\n\r\ndata: 2\r\n", 11, [b"1"]),
        (b"data:1\r\rdata:2\r", 8, [b"1"]),
        (b"data: 1\n\rdata: 2\n\r", 9, [b"1"]),
        (b"data: 1\r\n\r\ndata: 2\r\n\r", 11, [b"1"]),
        (b"data: 1\r\r\ndata: 2", 10, [b"1"]),
        (b"data: 1\n\n\ndata: 2\n: x\n\n", 23, [b"1", b"2"]),
        (b": ping\n\n", 8, []),
        (b"event: x\ndata: 1\ndata: 2\n\n", 26, [b"1\n2"]),
        (b"data: half", 0, []),
    ],
)
def test_server_sent_events(data: bytes, end: int, payloads: list[bytes]) -> None:
    framing = ServerSentEvents()
    assert framing.end_of_frames(data) == end and framing.payloads(data[:end]) == payloads


def test_ndjson() -> None:
    assert Ndjson().end_of_frames(b'{"a":1}\n{"b"') == 8
    assert Ndjson().payloads(b'{"a":1}\n\n{"b":2}\n') == [b'{"a":1}', b'{"b":2}']


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    ("framing", "events"),
    [
        (
            MessageEvents(),
            ["message_start", "content_block_delta", "content_block_delta", "content_block_stop", "message_stop"],
        ),
        (ResponseEvents(), ["response.created", "response.output_text.delta", "response.refusal.delta", "response.completed"]),
    ],
    ids=["messages", "responses"],
)
@pytest.mark.parametrize("is_named", [True, False])
def test_events_with_tokens_are_counted_however_they_are_written(
    framing: Framing, events: list[str], end: bytes, is_named: bool
) -> None:
    text = ' "type":"content_block_delta" x.delta'
    names = [b"event:" + event.encode() + end if is_named else b"" for event in events]
    for separators in ((",", ":"), (", ", ": ")):
        data = [json.dumps({"type": event, "text": text}, separators=separators).encode() for event in events]
        stream = b"".join(name + b"data: " + one + end + end for name, one in zip(names, data, strict=True))
        assert framing.count(stream) == 2
