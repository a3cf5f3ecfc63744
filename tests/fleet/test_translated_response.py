"""Translated answers: the same frames however a backend's bytes are cut, and no end unless the backend's answer has one."""

import functools
import json
import re
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from gateway.dialects import registry
from gateway.dialects.answers import BadFrame
from gateway.dialects.dialect import Call, Dialect, read_call
from gateway.dialects.translation import translators
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.backends.frame_buffer import HeldPieces, UnfinishedFrames
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.translated_response import TranslatedResponse
from tests.support.fake_backend.scripts import recording

DIALECTS = registry.dialects()
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"name": name, "input_schema": {"type": "object"}} for name in ("weather", "time")]
CALLS: dict[str, dict[str, Any]] = {
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 50, "tools": TOOLS},
    "/v1/responses": {"input": "hi", "tools": [{"type": "custom", "name": "weather"}, {"type": "function", "name": "time"}]},
    "/api/chat": {"messages": MESSAGES},
    "/api/generate": {"prompt": "hi"},
}
RAW = {"prompt": "hi", "raw": True}
CONFIG = BackendConfig("alpha", "http://127.0.0.1:1", "openai")
CHATS = [
    "openai_chat_stream.sse",
    "openai_chat_stream_vllm.sse",
    "openai_chat_stream_llamacpp.sse",
    "openai_chat_stream_crlf.sse",
    "openai_tool_call_stream.sse",
]
# What differs from one translation to the next: times and random names.
TIMES = re.compile(rb'"(created_at|completed_at|\w*_duration)":("[^"]*"|\d+)')
IDS = re.compile(rb"[a-z]+_[0-9a-f]{16,}")
# They stand for a backend's comments that arrive alone.
PINGS = (
    b'event: ping\ndata: {"type":"ping"}\n\n',
    b": ping\n\n",
    b'{"model":"m","created_at":0,"message":{"role":"assistant","content":""},"done":false}\n',
    b'{"model":"m","created_at":0,"response":"","done":false}\n',
)


def _chunk(delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def _part_of_call(index: int, arguments: str, **named: str) -> dict[str, Any]:
    function = {"arguments": arguments, **({"name": named.pop("name")} if "name" in named else {})}
    return {"tool_calls": [{"index": index, **named, "function": function}]}


ARGUMENTS = '{"input":"Zür\\u2028ich"}'
CHUNKS = [
    _chunk({"role": "assistant", "content": ""}),
    _chunk({"reasoning_content": "Let me "}),
    _chunk({"reasoning_content": "see"}),
    _chunk({"content": "Grüezi "}),
    _chunk({"content": "😀"}),
    _chunk(_part_of_call(0, ARGUMENTS[:8], id="call_1", name="weather")),
    # The parts of two calls alternate.
    _chunk(_part_of_call(1, ARGUMENTS[:3], id="call_2", name="time")),
    _chunk(_part_of_call(0, ARGUMENTS[8:])),
    _chunk(_part_of_call(1, ARGUMENTS[3:])),
    _chunk({}, "tool_calls"),
    {**_chunk({}), "choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}},
]


def _written(end: str) -> bytes:
    texts = [f"data: {json.dumps(chunk, ensure_ascii=False)}{end}{end}" for chunk in CHUNKS]
    return f": waiting{end}{end}{''.join(texts)}data: [DONE]{end}{end}".encode()


class Pieces:
    """A backend's response that consists of these pieces and then ends in order."""

    status, headers = 200, {}  # type: ignore[var-annotated]

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)

    async def read(self) -> bytes:
        return next(self._pieces, b"")

    def close(self) -> None:
        pass


@functools.cache
def _asked(path: str, is_raw: bool = False) -> tuple[Dialect, Call]:
    dialect = registry.by_prefix(DIALECTS)(path)
    body = {"model": "m", "stream": True, **(RAW if is_raw else CALLS[path])}
    call = read_call(dialect, registry.operations(DIALECTS)[path], json.dumps(body).encode())
    call.needs = call.need(4096)
    return dialect, call


def _response(path: str, pieces: Iterable[bytes], is_raw: bool) -> TranslatedResponse:
    dialect, call = _asked(path, is_raw)
    translator = translators.find(call, "openai")
    assert translator is not None
    upstream: Any = Pieces(pieces)
    translation = translator.translate(call, "openai")
    return TranslatedResponse(upstream, translation, dialect.framing, CONFIG, UnfinishedFrames(1 << 20), HeldPieces(1 << 20))


def _frames(path: str, pieces: Iterable[bytes], *, is_raw: bool = False) -> bytes:
    """The frames for the client until the end, or until the answer turns out to be broken."""
    response, frames = _response(path, pieces, is_raw), b""
    with suppress(BackendFault, BadFrame):
        while piece := _result(response.read()):
            frames += piece
    response.close()
    frames = IDS.sub(b"id", TIMES.sub(rb'"\1":0', frames))
    for ping in PINGS:
        frames = frames.replace(ping, b"")
    return frames


def _result(reading: Coroutine[Any, Any, bytes]) -> bytes:
    """Nothing here waits, so that no event loop is needed."""
    try:
        reading.send(None)
    except StopIteration as done:
        return bytes(done.value)
    raise AssertionError("a read waits")


def _is_complete(path: str, frames: bytes, *, is_raw: bool = False) -> bool:
    dialect, call = _asked(path, is_raw)
    return dialect.is_complete(dialect.framing.payloads(frames)[-3:], call)


@pytest.mark.parametrize("path", CALLS)
def test_a_stream_is_the_same_whichever_byte_it_is_cut_at(path: str) -> None:
    data = _written("\n")
    expected = _frames(path, [data])
    assert _is_complete(path, expected)
    for cut in range(1, len(data)):
        assert _frames(path, [data[:cut], data[cut:]]) == expected, cut
    assert _frames(path, [bytes([byte]) for byte in data]) == expected


@pytest.mark.parametrize("path", CALLS)
def test_a_cut_within_the_end_of_a_line_changes_nothing(path: str) -> None:
    data = _written("\r\n")
    expected = _frames(path, [_written("\n")])
    ends = [place + step for place in range(len(data)) if data[place] == 13 for step in (0, 1)]
    for cut in ends:
        assert _frames(path, [data[:cut], data[cut:]]) == expected, cut


@pytest.mark.parametrize(("path", "name"), [(path, name) for path in CALLS for name in CHATS])
def test_recorded_streams_are_the_same_however_they_are_cut(path: str, name: str) -> None:
    data = recording(name)
    expected = _frames(path, [data])
    assert _is_complete(path, expected)
    for size in (1, 7, 100):
        assert _frames(path, [data[at : at + size] for at in range(0, len(data), size)]) == expected


@pytest.mark.parametrize("path", CALLS)
def test_a_stream_that_stops_at_any_byte_before_its_end_is_not_complete(path: str) -> None:
    data = _written("\n")
    expected = _frames(path, [data])
    last_chunk = data.index(b'"tool_calls"}')
    for stop in range(last_chunk):
        frames = _frames(path, [data[:stop]])
        assert expected.startswith(frames) and not _is_complete(path, frames), stop


def test_raw_completions_are_the_same_however_they_are_cut() -> None:
    path, data = "/api/generate", recording("openai_completion_stream.sse")
    expected = _frames(path, [data], is_raw=True)
    assert _is_complete(path, expected, is_raw=True)
    for cut in range(1, len(data), 3):
        assert _frames(path, [data[:cut], data[cut:]], is_raw=True) == expected, cut
    for stop in range(0, len(data) - 700, 3):
        frames = _frames(path, [data[:stop]], is_raw=True)
        assert expected.startswith(frames) and not _is_complete(path, frames, is_raw=True), stop


@pytest.mark.parametrize("path", CALLS)
def test_each_text_comes_with_the_frame_that_had_it(path: str) -> None:
    frames = _written("\n").split(b"\n\n")
    for number, text in ((3, "see"), (4, "Gr\u00fcezi "), (5, "\U0001f600")):
        so_far = _frames(path, [b"\n\n".join(frames[: number + 1]) + b"\n\n"])
        assert text.encode() in so_far or json.dumps(text).strip('"').encode() in so_far, (number, so_far)


@pytest.mark.parametrize("path", CALLS)
def test_interleaved_calls_are_not_mixed(path: str) -> None:
    frames = _frames(path, [_written("\n")]).decode()
    dialect = registry.by_prefix(DIALECTS)(path)
    events = [json.loads(payload) for payload in dialect.framing.payloads(frames.encode())]
    if path == "/v1/messages":
        blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
        parts: dict[int, str] = {}
        for event in events:
            if event.get("delta", {}).get("type") == "input_json_delta":
                parts[event["index"]] = parts.get(event["index"], "") + event["delta"]["partial_json"]
        assert [json.loads(part) for part in parts.values()] == [json.loads(ARGUMENTS)] * 2
        # A block begins only when the one before has ended.
        opened = [
            event["type"].removeprefix("content_block_") for event in events if event["type"].startswith("content_block_")
        ]
        assert [kind for kind in opened if kind != "delta"] == ["start", "stop"] * 4
    elif path == "/v1/responses":
        output = events[-1]["response"]["output"]
        assert [item["type"] for item in output] == ["reasoning", "message", "custom_tool_call", "function_call"]
        assert output[2]["input"] == "Zür\u2028ich" and json.loads(output[3]["arguments"]) == json.loads(ARGUMENTS)
    else:
        calls = [call for event in events for call in event.get("message", event).get("tool_calls") or ()]
        assert [call["function"]["arguments"] for call in calls] == [json.loads(ARGUMENTS)] * 2
