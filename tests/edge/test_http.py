"""HTTP/1 from untrusted clients: split anywhere, with upgrades, trailers or pipelines, half-closed, or HTTP/1.0."""

import http.client
import io
import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, Chat
from tests.support.echo_server import EchoServer
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

WISH = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
BODY = b"Upgrade: x\r\nhttp2-settings: y\r\n\r\nGET /stolen HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    with EchoServer() as server:
        yield server


class Answers:
    """Reads the answers on one connection, one after another."""

    def __init__(self, connection: socket.socket) -> None:
        self._file = connection.makefile("rb")

    def next(self, method: str = "GET") -> http.client.HTTPResponse:
        answer = http.client.HTTPResponse(Same(self._file), method=method)  # type: ignore[arg-type]
        answer.begin()
        return answer

    def json(self) -> Any:
        return json.loads(self.next().read())

    def is_at_end(self) -> bool:
        return self._file.read(1) == b""


class Same:
    """A socket that returns the same file each time and never closes it."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file

    def makefile(self, _mode: str) -> "Same":
        return self

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "close" else getattr(self._file, name)


def post(body: bytes, *more: bytes, path: bytes = b"/first") -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (path, b"".join(more), len(body), body)


def chunked(body: bytes, *more: bytes, size: int = 7, trailers: bytes = b"", path: bytes = b"/first") -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\n%bTransfer-Encoding: chunked\r\n\r\n" % (path, b"".join(more))
    return head + chunks + b"0\r\n" + trailers + b"\r\n"


REQUESTS = {
    "plain": post(BODY),
    "with a wish": post(BODY, WISH),
    "with a wish, chunked": chunked(BODY, WISH),
    "with a wish and nothing else": b"GET /first HTTP/1.1\r\nHost: x\r\n" + WISH + b"\r\n",
    "chunked with trailers": chunked(BODY, trailers=b"X-Late: 1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n"),
}


@pytest.mark.parametrize("request_bytes", REQUESTS.values(), ids=REQUESTS)
def test_a_request_may_be_split_anywhere(echo: EchoServer, request_bytes: bytes) -> None:
    """On one connection, as proxies share it: each following request is answered separately."""
    whole = request_bytes + NEXT
    expected = "" if request_bytes.startswith(b"GET") else BODY.decode()
    with echo.connect() as connection:
        answers = Answers(connection)
        for cut in range(1, len(whole)):
            connection.sendall(whole[:cut])
            # A moment in which the first part is read by itself.
            time.sleep(0.0004)
            connection.sendall(whole[cut:])
            first, second = answers.json(), answers.json()
            assert (first["path"], first["body"]) == ("/first", expected), cut
            assert "x-late" not in first["headers"]
            assert (second["method"], second["path"], second["body"]) == ("GET", "/next", ""), cut


def test_upgrades_are_ignored_in_any_split(echo: EchoServer) -> None:
    with echo.connect() as connection:
        answers = Answers(connection)
        for byte in post(BODY, WISH):
            connection.sendall(bytes([byte]))
        assert answers.json()["body"] == BODY.decode()
        connection.sendall((post(BODY, WISH) + chunked(BODY, WISH) + NEXT) * 20)
        answered = [answers.json() for _ in range(60)]
    assert [one["path"] for one in answered] == ["/first", "/first", "/next"] * 20
    assert [one["body"] for one in answered] == [BODY.decode(), BODY.decode(), ""] * 20


def test_an_upgrade_with_connection_close_closes(echo: EchoServer) -> None:
    with echo.connect() as connection:
        connection.sendall(post(BODY, b"Connection: upgrade, close\r\nUpgrade: websocket\r\n") + NEXT)
        answers = Answers(connection)
        assert answers.json()["body"] == BODY.decode()
        assert answers.is_at_end()


HOST, CHUNKS = b"Host: x\r\n", b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
REFUSED = {
    "CONNECT": (b"CONNECT x:443 HTTP/1.1\r\nHost: x:443\r\n\r\n" + NEXT, 400),
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "two Hosts by HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "a Host that is none": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "gzip, chunked": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip, chunked" + CHUNKS, 501),
    "gzip and chunked": (
        b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked" + CHUNKS,
        501,
    ),
    "gzip alone": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: gzip" + CHUNKS, 400),
    "identity": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: identity" + CHUNKS, 400),
    "chunked twice": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked, chunked" + CHUNKS, 400),
    "chunked and a length": (
        b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked" + CHUNKS,
        400,
    ),
    "chunked by HTTP/1.0": (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked" + CHUNKS, 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "RTSP": (b"OPTIONS rtsp://x/next RTSP/1.0\r\n" + HOST + b"\r\n", 400),
    "RTSP of version 1.1": (b"\r\nPOST /next RTSP/1.1\r\n" + HOST + b"Via: HTTP/1.1\r\n\r\n", 400),
    "ICE": (b"SOURCE /next ICE/1.0\r\n" + HOST + b"\r\n", 400),
    "a target with a fragment": (b"GET /next#part HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00", 400),
    "a wrong chunk": (b"POST / HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    "many lines": (b"GET / HTTP/1.1\r\n" + HOST + b"a:\r\n" * 300 + b"\r\n", 431),
    "a long line": (b"GET / HTTP/1.1\r\n" + HOST + b"a: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    "a long target": (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
}


@pytest.mark.parametrize(("sent", "status"), REFUSED.values(), ids=REFUSED)
def test_invalid_http_is_refused_once_and_the_connection_closed(echo: EchoServer, sent: bytes, status: int) -> None:
    with echo.connect() as connection:
        connection.sendall(sent + NEXT)
        answers = Answers(connection)
        refused = answers.next()
        assert refused.status == status and refused.headers["connection"] == "close"
        assert "refused" in json.loads(refused.read())
        assert answers.is_at_end()


def test_valid_http_is_accepted(echo: EchoServer) -> None:
    allowed = [
        b"GET /next HTTP/1.1\r\nHost:\r\n\r\n",
        b"GET /next HTTP/1.1\r\nhOsT: [::1]:80\r\n\r\n",
        b"GET http://other/next HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\r\n\r\nGET /next HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /next HTTP/1.1\r\nHost: x\r\n" + b"a:\r\n" * 200 + b"\r\n",
        chunked(b"abc", path=b"/next").replace(b"chunked", b" Chunked"),
        chunked(b"abc", path=b"/next").replace(b"3\r\n", b"000003;name=value\r\n"),
    ]
    with echo.connect() as connection:
        answers = Answers(connection)
        for request in allowed:
            connection.sendall(request)
            assert answers.json()["path"] == "/next", request


TOO_MUCH = {
    "trailers": (b"0\r\n", b"a:\r\n"),
    "one trailer": (b"0\r\na: ", b"x" * 1000),
    "one extension": (b"1;", b"x" * 1000),
    "extensions": (b"", b"1;" + b"x" * 900 + b"\r\ny\r\n"),
    "sizes": (b"", b"0" * 900),
}


@pytest.mark.parametrize("path", [b"/first", b"/ignore"])
@pytest.mark.parametrize(("begin", "again"), TOO_MUCH.values(), ids=TOO_MUCH)
def test_the_framing_of_a_body_is_bounded(
    echo: EchoServer, monkeypatch: pytest.MonkeyPatch, begin: bytes, again: bytes, path: bytes
) -> None:
    """`/ignore` has been answered by then: no error can be sent any more, but nothing is kept either."""
    monkeypatch.setattr("gateway.edge.protocol.REFUSED_CONNECTION_LINGERS_S", 0.1)
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" % path
    with echo.connect() as connection:
        connection.sendall(head + begin + again * (40_000 // len(again)))
        assert connection.recv(12) == b"HTTP/1.1 200" if path == b"/ignore" else True
        with pytest.raises(OSError):
            for _ in range(400):
                connection.sendall(again * (50_000 // len(again)))
                time.sleep(0.01)


def test_trailers_within_the_bound_are_ignored(echo: EchoServer) -> None:
    late = b"X-Api-Key: k\r\nX-Request-ID: mine\r\nHost: y\r\nExpect: 100-continue\r\n"
    with echo.connect() as connection:
        connection.sendall(chunked(b"abc", trailers=late + b"a:\r\n" * 10_000) + NEXT)
        answers = Answers(connection)
        assert answers.json()["headers"] == ["host", "transfer-encoding"]
        assert answers.json()["path"] == "/next"
        connection.sendall(chunked(b"abc", trailers=b"Connection: close\r\n") + NEXT)
        assert answers.json()["body"] == "abc"
        assert answers.is_at_end()


def test_a_body_of_tiny_chunks_and_blank_lines_arrives_complete(echo: EchoServer) -> None:
    body = b"\r\n\r\n0\r\n\r\n" * 8000
    with echo.connect() as connection:
        answers = Answers(connection)
        for size in (1, 3, 40_000):
            connection.sendall(chunked(body, size=size) + NEXT)
            assert answers.json()["body"] == body.decode()
            assert answers.json()["path"] == "/next"


def test_pipelined_requests_are_answered_in_order_and_bounded(echo: EchoServer) -> None:
    large = post(b"x" * 200_000)
    with echo.connect() as connection:
        answers = Answers(connection)
        connection.sendall(b"GET /wait/0.2 HTTP/1.1\r\nHost: x\r\n\r\n" + NEXT * 300)
        assert answers.json()["path"] == "/wait/0.2"
        assert {answers.json()["path"] for _ in range(300)} == {"/next"}
        connection.sendall(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n" + large * 5 + NEXT)
        assert answers.next().read() == b"piece\n" * 3
        assert {len(answers.json()["body"]) for _ in range(5)} == {200_000}
        assert answers.json()["path"] == "/next"


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


WAYS_OUT: dict[str, Callable[[socket.socket], None]] = {"closes": socket.socket.close, "resets": reset}
BEHIND = {"nothing": b"", "a line end": b"\r\n", "a request": NEXT, "half a head": NEXT[:20], "a lot": post(b"x" * 400_000)}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("leave", WAYS_OUT.values(), ids=WAYS_OUT)
def test_a_client_that_leaves_is_noticed_whatever_it_has_pipelined(
    echo: EchoServer, leave: Callable[[socket.socket], None], behind: bytes
) -> None:
    echo.gone.clear()
    connection = echo.connect()
    connection.sendall(b"GET /wait/8 HTTP/1.1\r\nHost: x\r\n\r\n")
    time.sleep(0.02)
    connection.setblocking(False)
    sent = connection.send(behind) if behind else 0
    assert bool(sent) == bool(behind)
    time.sleep(0.05)
    leave(connection)
    until(lambda: echo.gone == ["/wait/8?"], 4)


@pytest.mark.parametrize("seconds", ["0.05", "0.4"])
def test_a_client_that_only_closes_its_side_gets_its_answers(echo: EchoServer, seconds: str) -> None:
    echo.gone.clear()
    with echo.connect() as connection:
        connection.sendall(f"GET /wait/{seconds} HTTP/1.1\r\nHost: x\r\n\r\n".encode() + post(BODY, path=b"/last"))
        connection.shutdown(socket.SHUT_WR)
        answers = Answers(connection)
        assert answers.json()["path"] == f"/wait/{seconds}"
        assert answers.json()["body"] == BODY.decode()
        assert answers.is_at_end()
    with echo.connect() as connection:
        connection.sendall(f"GET /stream/{seconds} HTTP/1.1\r\nHost: x\r\n\r\nGET /half HTT".encode())
        connection.shutdown(socket.SHUT_WR)
        answers = Answers(connection)
        assert answers.next().read() == b"piece\n" * 3
        assert answers.is_at_end()
    assert not echo.gone


def test_an_incomplete_request_gets_no_answer(echo: EchoServer) -> None:
    for half in (b"", b"GET / HT", post(b"abc")[:-1], chunked(b"abc")[:-2]):
        with echo.connect() as connection:
            connection.sendall(half)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""


def test_http_1_0_is_answered_as_http_1_0(echo: EchoServer) -> None:
    with echo.connect() as connection:
        answers = Answers(connection)
        for _ in range(2):
            connection.sendall(b"GET /first HTTP/1.0\r\nConnection: keep-alive\r\nExpect: 100-continue\r\n\r\n")
            kept = answers.next()
            assert kept.status == 200 and kept.headers["connection"] == "keep-alive"
            assert json.loads(kept.read())["path"] == "/first"
        connection.sendall(b"GET /stream HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        streamed = answers.next()
        assert "transfer-encoding" not in streamed.headers and streamed.headers["connection"] == "close"
        assert streamed.read() == b"piece\n" * 3
    with echo.connect() as connection:
        connection.sendall(b"GET /first HTTP/1.0\r\n\r\n")
        assert b"connection: close" in connection.makefile("rb").read()


def test_a_client_of_http_1_0_that_leaves_is_noticed(echo: EchoServer) -> None:
    """Nothing can be sent to find out; but HTTP/1.0 proxies close their side only when they leave."""
    echo.gone.clear()
    with echo.connect() as connection:
        connection.sendall(b"GET /wait/8 HTTP/1.0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        until(lambda: echo.gone == ["/wait/8?"], 4)
        assert connection.recv(100) == b""


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


def ask(gateway: RunningGateway, *lines: str, body: bytes = b"", path: str = "/v1/models") -> http.client.HTTPResponse:
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.settimeout(10)
        connection.sendall("\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        answer.data = answer.read()  # type: ignore[attr-defined]
        return answer


def test_errors_are_in_the_callers_dialect(gateway: RunningGateway) -> None:
    native = ask(gateway, path="/api/chat")
    assert native.status == 400 and "exactly one Host" in json.loads(native.data)["error"]  # type: ignore[attr-defined]
    answer = ask(gateway, "Host: x", "Transfer-Encoding: gzip, chunked", path="/k/nz_x/v1/chat/completions")
    assert answer.status == 501 and answer.headers["x-should-retry"] == "false" and answer.headers["x-request-id"]
    error = json.loads(answer.data)["error"]  # type: ignore[attr-defined]
    assert (error["code"], error["type"]) == ("unsupported_transfer_encoding", "invalid_request_error")
    key = f"Authorization: Bearer {gateway.key()}"
    wrong = ask(gateway, "Host: x", key, "Transfer-Encoding: chunked", body=b"xx\r\n", path="/v1/chat/completions")
    assert wrong.status == 400 and "not valid HTTP" in json.loads(wrong.data)["error"]["message"]  # type: ignore[attr-defined]
    assert [line["outcome"] for line in gateway.request_lines()] == [
        "refused:bad_request",
        "refused:unsupported_transfer_encoding",
        "refused:bad_request",
    ]


def test_keys_and_addresses_in_trailers_are_ignored(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, GATEWAY_TRUSTED_PROXIES="127.0.0.1")
    key = gateway.key()
    body = json.dumps(CHATS[0].body).encode()
    late = f"X-Api-Key: {key}\r\nX-Forwarded-For: 192.0.2.1\r\nX-Request-ID: mine\r\n"
    chunks = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, late.encode())
    refused = ask(gateway, "Host: x", "Transfer-Encoding: chunked", body=chunks, path="/api/chat")
    assert refused.status == 401
    answered = ask(gateway, "Host: x", f"X-Api-Key: {key}", "Transfer-Encoding: chunked", body=chunks, path="/api/chat")
    assert answered.status == 200
    assert [line["client"] for line in gateway.request_lines()] == ["127.0.0.1"] * 2
    assert "mine" not in [line["request_id"] for line in gateway.request_lines()]


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_a_call_ends_when_a_client_with_pipelined_requests_leaves(
    gateway: RunningGateway, alpha: FakeBackend, chat: Chat
) -> None:
    alpha.play(chat.path, FAULTS["head_timeout"](chat.dialect, chat.streamed))
    body = json.dumps(chat.body).encode()
    head = (
        f"POST {chat.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key()}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + body + NEXT)
        until(lambda: alpha.in_flight == 1, 5)
        connection.sendall(NEXT)
    began = time.monotonic()
    until(lambda: alpha.in_flight == 0, 4)
    assert time.monotonic() - began < 2
    assert gateway.request_lines()[0]["outcome"] == "client_gone"
    assert gateway.components.backends["alpha"].in_flight == 0


def test_an_upload_of_invalid_http_is_the_clients_error(gateway: RunningGateway, alpha: FakeBackend) -> None:
    path, key = f"/api/blobs/sha256:{'0' * 64}", f"Authorization: Bearer {gateway.admin_key()}"
    got = ask(gateway, "Host: x", key, "Transfer-Encoding: chunked", body=b"3\r\nabc\r\nxx\r\n", path=path)
    assert got.status == 400 and "not valid HTTP" in json.loads(got.data)["error"]  # type: ignore[attr-defined]
    assert gateway.request_lines()[-1]["outcome"] == "refused:bad_request"
    assert gateway.components.backends["alpha"].in_flight == 0
