"""The frame buffer returns complete frames and keeps the rest."""

from gateway.dialects.openai import ServerSentEvents
from gateway.fleet.backends.frame_buffer import FrameBuffer, UnfinishedFrames


def test_the_end_of_an_event_may_be_split_anywhere() -> None:
    sent = b'data: {"a":1}\n\rdata: 2\r\n\r\ndata: 3\n\r\ndata: 4\r\rdata: 5\n\n'
    for cut in range(len(sent)):
        buffer = FrameBuffer(ServerSentEvents(), UnfinishedFrames(1))
        frames = [buffer.add(sent[:cut]), *(buffer.add(sent[at : at + 1]) for at in range(cut, len(sent)))]
        assert b"".join(frames) == sent and not buffer.rest
        read = [payload for frame in frames for payload in ServerSentEvents().payloads(frame)]
        assert read == [b'{"a":1}', b"2", b"3", b"4", b"5"]
