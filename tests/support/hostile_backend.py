"""A backend that sends harmful answers at full speed. It runs as its own process and prints its port.

The prompt names the behaviour. No answer is endless: some megabytes, then silence until the client leaves.
"""

import gzip
import json
import socketserver
import time
from collections.abc import Callable, Iterator

MODEL = "hostile:latest"
BLOCK = 256 * 1024
SILENCE_S = 20.0
Behaviour = Callable[[bool, bool], Iterator[bytes]]

FRAME = {
    True: b'{"model":"m","message":{"role":"assistant","content":"x"},"done":false}\n',
    False: b'data: {"model":"m","choices":[{"index":0,"delta":{"content":"x"},"finish_reason":null}]}\n\n',
}
LAST = {
    True: b'{"model":"m","message":{"role":"assistant","content":""},"done":true,"prompt_eval_count":1,"eval_count":1}\n',
    False: b'data: {"model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n',
}
END = {True: b'{"done":true}\n', False: b"data: [DONE]\n\n"}
WHOLE = {
    True: LAST[True],
    False: b'{"model":"m","choices":[{"index":0,"message":{"role":"assistant","content":"x"},"finish_reason":"stop"}]}',
}
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def good_answer(native: bool, streamed: bool) -> bytes:
    return FRAME[native] + LAST[native] if streamed else WHOLE[native]


def flood(piece: bytes, size: int = 3 * 2**19) -> Iterator[bytes]:
    block = piece * max(1, BLOCK // len(piece))
    for _ in range(max(1, size // len(block))):
        yield block


def sends(*pieces: bytes) -> Behaviour:
    def behaviour(native: bool, streamed: bool) -> Iterator[bytes]:
        yield from pieces

    return behaviour


def floods(beginning: bytes, piece: bytes, size: int = 3 * 2**19) -> Behaviour:
    def behaviour(native: bool, streamed: bool) -> Iterator[bytes]:
        yield beginning
        yield from flood(piece, size)

    return behaviour


def with_good(form: Callable[[bytes], bytes]) -> Behaviour:
    """A correct answer in a wrong form."""

    def behaviour(native: bool, streamed: bool) -> Iterator[bytes]:
        yield form(good_answer(native, streamed))

    return behaviour


def after_first(more: Callable[[bool], Iterator[bytes]]) -> Behaviour:
    """A correct first frame, then something else."""

    def behaviour(native: bool, streamed: bool) -> Iterator[bytes]:
        yield CHUNKED + chunk(FRAME[native] if streamed else b" ")
        yield from more(native)

    return behaviour


def sized(data: bytes, size: int | None = None, more: bytes = b"") -> bytes:
    return OK + more + b"Content-Length: %d\r\n\r\n%b" % (len(data) if size is None else size, data)


def tiny_lists(native: bool, streamed: bool) -> Iterator[bytes]:
    """Millions of lists in a field that nobody reads, as a whole answer or as one frame."""
    size = 6 * 2**20 if streamed else 12 * 2**20
    end = b'[]],"done":true,"message":{"content":"x"},"choices":[{"message":{"content":"x"}}]}'
    yield CHUNKED + chunk(b'{"x":[' if native or not streamed else b'data: {"x":[')
    for block in flood(b"[]," * 1000, size):
        yield chunk(block)
    yield chunk(end + (b"\n\n" if streamed else b"")) + b"0\r\n\r\n"


def behind_the_end(native: bool, piece: bytes) -> Iterator[bytes]:
    yield chunk(LAST[native])
    yield from flood(piece, 8 * 2**20)


def good_frames(native: bool) -> Iterator[bytes]:
    return flood(chunk(FRAME[native]), 2 * 2**20)


def trickled(native: bool, streamed: bool) -> Iterator[bytes]:
    yield CHUNKED
    for byte in good_answer(native, streamed) * 3:
        yield chunk(bytes([byte]))
        time.sleep(0.1)


BEHAVIOURS: dict[str, Behaviour] = {
    "silence": sends(),
    "half a status line": sends(b"HTTP/1.1 2"),
    "no HTTP": sends(b"220 mail.example ESMTP\r\n"),
    "status 999": sends(b"HTTP/1.1 999 X\r\nContent-Length: 2\r\n\r\n{}"),
    "a storm of 100s": floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a storm of short 100s": floods(b"", b"HTTP/1.1 102 \r\n\r\n"),
    "an endless header line": floods(OK + b"X: ", b"x"),
    "endless header lines": floods(OK, b"x:\r\n"),
    "long header lines": floods(OK, b"x: " + b"y" * 60_000 + b"\r\n"),
    "a header without a colon": with_good(lambda data: sized(data, more=b"nonsense\r\n")),
    "two lengths": with_good(lambda data: sized(data, more=b"Content-Length: 5\r\n")),
    "a negative length": with_good(lambda data: sized(data, -1)),
    "a length too long": with_good(lambda data: sized(data, 10**15)),
    "a length too short": with_good(lambda data: sized(data, len(data) // 2)),
    "length and chunks": with_good(lambda data: OK + b"Content-Length: 3\r\n" + CHUNKED[len(OK) :] + chunk(data)),
    "gzip, chunked": with_good(lambda data: OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunk(data) + b"0\r\n\r\n"),
    "no chunk's size": with_good(lambda data: CHUNKED + b"zz\r\n" + data),
    "a chunk without end": floods(CHUNKED + b"ffffffffffffff0\r\n", b"x"),
    "an endless chunk extension": floods(CHUNKED + b"1;", b"x"),
    "chunks of a byte": floods(CHUNKED, b"1\r\nx\r\n"),
    "chunks of a line's end": floods(CHUNKED, b"1\r\n\n\r\n"),
    "chunks of three bytes": floods(CHUNKED, b"3\r\n{}\n\r\n"),
    "tiny frames behind a good one": after_first(lambda native: flood(chunk(b"{}\n" if native else b":\n\n"))),
    "bytes behind a good frame": after_first(lambda native: flood(chunk(b"x"))),
    "good frames at full speed": after_first(good_frames),
    "a line without end": floods(OK + b"\r\n", b"x" * 1000, 20 * 2**20),
    "a line without end behind a good frame": after_first(lambda native: flood(chunk(b"x" * 60_000), 20 * 2**20)),
    "comments without end": floods(CHUNKED, chunk(b": ping\n\n")),
    "trailers": with_good(lambda data: CHUNKED + chunk(data) + b"0\r\n" + b"a:\r\n" * 200_000),
    "gzip": with_good(lambda data: sized(gzip.compress(data), more=b"Content-Encoding: gzip\r\n")),
    "gzip of zeros": sends(sized(gzip.compress(b"\0" * 2**24), more=b"Content-Encoding: gzip\r\n")),
    "tiny lists": tiny_lists,
    "deep lists": floods(OK + b"\r\n", b"[", 10 * 2**20),
    "zeros": sends(sized(b"\0" * 1000)),
    "no UTF-8": with_good(lambda data: sized(data.replace(b"x", b"\xff\xfe"))),
    "half a surrogate": with_good(lambda data: sized(data.replace(b"x", b"\\ud800"))),
    "huge counts": with_good(lambda data: sized(data.replace(b'_count":1', b'_count":1e308'))),
    "an error behind a good frame": after_first(lambda native: iter([chunk(b'{"error":"no"}\n'), b"0\r\n\r\n"])),
    "a false end, again and again": after_first(lambda native: flood(chunk(END[native] + FRAME[native]), 2 * 2**20)),
    "thousands of ends": after_first(lambda native: flood(chunk(END[native]), 2 * 2**20)),
    "thousands of ends in each piece": after_first(lambda native: flood(chunk(END[native] * 4000), 8 * 2**20)),
    "comments without end behind the last frame": after_first(lambda native: behind_the_end(native, chunk(b": ping\n\n"))),
    "long comments behind the last frame": after_first(
        lambda native: behind_the_end(native, chunk(b": %b\n\n" % (b"x" * 60_000)))
    ),
    "more behind the last frame": with_good(lambda data: CHUNKED + chunk(data) * 5000),
    "a byte now and then": trickled,
    "another protocol": floods(b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n", b"x"),
    "no content": sends(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "a redirect": sends(b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"),
    "not modified": sends(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "a wait of years": sends(b"HTTP/1.1 503 X\r\nRetry-After: 99999999999999999999\r\nContent-Length: 0\r\n\r\n"),
    "an endless failure": floods(b"HTTP/1.1 500 X\r\n\r\n", b"x"),
    "an endless refusal": floods(b'HTTP/1.1 400 X\r\n\r\n{"error":"', b"x"),
    "two answers": with_good(lambda data: sized(data) * 2),
    "line ends of Macintosh": with_good(lambda data: sized(data).replace(b"\r\n", b"\r")),
}
USAGE_ONLY = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
LONG_CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"x%b"}}],"a":[%b],"usage":%b}\n\n'
# Streams of the OpenAI dialect with token counts that the caller did not ask for.
COUNTS: dict[str, Behaviour] = {
    "many counts": after_first(lambda native: iter([chunk(USAGE_ONLY * 2000)] * 25)),
    "counts in a row": after_first(lambda native: iter([chunk(b'data: {"usage":1}\n\r' * 400_000 + b"\n\n")] * 2)),
    "counts in words": after_first(
        lambda native: iter([chunk(LONG_CHUNK % (b',\\"usage\\": ' * 600_000, b"", b'{"a":1}'))] * 4)
    ),
    "no counts in long chunks": after_first(
        lambda native: iter([chunk(LONG_CHUNK % (b"", b"1," * 100_000 + b"1", b"null"))] * 20)
    ),
    "an event of many lines": after_first(lambda native: iter([chunk(b"data: a\n" * 10_000)] * 100 + [b"0\r\n\r\n"])),
}
LISTS = {
    "/api/tags": {"models": [{"name": MODEL, "model": MODEL}]},
    "/api/ps": {"models": []},
    "/api/version": {"version": "1.0.0"},
}


class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.request.settimeout(SILENCE_S)
        try:
            while self._answer():
                pass
        except OSError:
            return

    def _answer(self) -> bool:
        line, length = self.rfile.readline().split(), 0
        while line and (header := self.rfile.readline().strip()):
            if header.lower().startswith(b"content-length:"):
                length = int(header.partition(b":")[2])
        if not line:
            return False
        path, body = line[1].decode(), self.rfile.read(length)
        if path in LISTS:
            self.wfile.write(sized(json.dumps(LISTS[path]).encode()))
            return True
        fields = json.loads(body)
        behaviour = {**BEHAVIOURS, **COUNTS}[fields["messages"][-1]["content"]]
        for piece in behaviour(path.startswith("/api/"), fields.get("stream") is True):
            self.request.sendall(piece)
        return True


class Server(socketserver.ThreadingTCPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, 128


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
