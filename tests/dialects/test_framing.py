"""Streams are cut into frames: server-sent events and lines of JSON."""

import pytest

from gateway.dialects.ollama import Ndjson
from gateway.dialects.openai import ServerSentEvents


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
