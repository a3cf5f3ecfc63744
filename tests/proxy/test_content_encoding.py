"""Compressed request bodies: decoded exactly, in bounded pieces, and never beyond the bound of the whole."""

import asyncio
import gzip
import json
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.audit.record import Record
from gateway.auth.key import ADMIN, ADMIN_MODELS
from gateway.core.cancel_scope import CancelScope
from gateway.core.errors import BadRequest, ClientGone, UnsupportedEncoding
from gateway.dialects import registry
from gateway.proxy import content_encoding
from gateway.proxy.body import Bodies
from gateway.proxy.content_encoding import Decoder, encoding_of
from tests.conftest import StartGateway
from tests.support.chat_requests import MESSAGES, MODEL
from tests.support.coding_agents import recordings
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 1_000_000
EMPTY = [("gzip", gzip.compress(b"")), ("zstd", zstd.compress(b"")), ("zstd", b"\x50\x2a\x4d\x18\x00\x00\x00\x00")]


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(data) + stream.flush()


def streamed_zstd(data: bytes, window_log: int = 20) -> bytes:
    """Without the size of the content, as clients send it that compress while they write."""
    stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: window_log})
    return stream.compress(data) + stream.flush()


# What clients send, by name: the Content-Encoding and what makes the body.
FORMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "x-gzip": ("X-GZIP", gzip.compress),
    "deflate of zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "zstd": ("ZSTD", zstd.compress),
    "streamed zstd": ("zstd", streamed_zstd),
}
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"


def decoded(encoding: str, body: bytes, most: int = LIMIT, piece: int = content_encoding.LARGEST_PIECE_WRITTEN) -> bytes:
    decoder = Decoder(encoding, body)
    while not decoder.is_complete and decoder.size <= most:
        decoder.decode(min(piece, most + 1 - decoder.size))
    return decoder.take()


@pytest.mark.parametrize("form", FORMS)
@given(data=st.binary(max_size=2000), repeat=st.integers(1, 300), piece=st.integers(1, 5000))
@example(data=b"", repeat=1, piece=1)
@example(data=b"0", repeat=5000, piece=5000)
@example(data=b"0", repeat=5000, piece=4999)
def test_what_was_compressed_comes_back(form: str, data: bytes, repeat: int, piece: int) -> None:
    encoding, encode = FORMS[form]
    whole = data * repeat
    assert decoded(encoding_of(encoding.encode()), encode(whole), piece=piece * repeat) == whole[: LIMIT + 1]


@given(parts=st.lists(st.binary(max_size=300), min_size=1, max_size=20), piece=st.integers(1, 500))
def test_several_members_and_frames_are_one_body(parts: list[bytes], piece: int) -> None:
    assert decoded("gzip", b"".join(map(gzip.compress, parts)), piece=piece) == b"".join(parts)
    frames = b"".join(zstd.compress(part) + SKIPPABLE for part in parts)
    assert decoded("zstd", SKIPPABLE + frames, piece=piece) == b"".join(parts)


@pytest.mark.parametrize("form", FORMS)
def test_a_body_cut_anywhere_is_refused(form: str) -> None:
    encoding, encode = FORMS[form]
    body = encode(json.dumps({"model": "a", "numbers": list(range(200))}).encode())
    for end in range(1, len(body)):
        with pytest.raises(BadRequest, match="ends before its"):
            decoded(encoding_of(encoding.encode()), body[:end], piece=100)


@pytest.mark.parametrize("form", FORMS)
@given(noise=st.binary(min_size=1, max_size=20))
@example(noise=b"\0")
@example(noise=b"\0" * 12)
def test_bytes_after_the_end_are_refused(form: str, noise: bytes) -> None:
    encoding, encode = FORMS[form]
    with pytest.raises(BadRequest):
        decoded(encoding_of(encoding.encode()), encode(b"{}") + noise)


@given(encoding=st.sampled_from(content_encoding.SUPPORTED), body=st.binary(min_size=1, max_size=300))
def test_any_bytes_are_decoded_or_refused(encoding: str, body: bytes) -> None:
    for start in (b"", b"\x1f\x8b\x08\x00", b"\x78\x9c", b"\x28\xb5\x2f\xfd"):
        try:
            decoded(encoding, start + body)
        except BadRequest as refused:
            assert encoding in refused.message


@given(value=st.binary(max_size=20))
@example(value=b"br")
@example(value=b"gzip, zstd")
@example(value=b"gzip,")
@example(value=b"zstandard")
@example(value=b"\xff")
def test_other_encodings_and_several_are_refused(value: bytes) -> None:
    if value.strip().lower() in (b"gzip", b"x-gzip", b"deflate", b"zstd"):
        return
    with pytest.raises(UnsupportedEncoding, match="gzip, deflate or zstd"):
        encoding_of(value)


BOMB = b"0" * (100 * LIMIT)
BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip": ("gzip", lambda: gzip.compress(BOMB)),
    "members": ("gzip", lambda: gzip.compress(b"0" * LIMIT) * 300),
    "deflate": ("deflate", lambda: zlib.compress(BOMB)),
    "zstd": ("zstd", lambda: zstd.compress(BOMB)),
    "frames": ("zstd", lambda: zstd.compress(b"0" * LIMIT) * 300),
    "a window of 8 MiB": ("zstd", lambda: streamed_zstd(BOMB, content_encoding.WINDOW_LOG)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_decoded_to_its_bound_and_no_further(name: str) -> None:
    encoding, make = BOMBS[name]
    body = make()
    tracemalloc.start()
    try:
        assert len(decoded(encoding, body)) == LIMIT + 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The output grows by an eighth at a time.
    assert peak < 1.2 * LIMIT + 3 * content_encoding.LARGEST_PIECE_WRITTEN


def test_a_frame_that_needs_a_larger_window_is_refused() -> None:
    body = streamed_zstd(b"x" * 100, content_encoding.WINDOW_LOG + 1)
    with pytest.raises(BadRequest, match="zstd with a window of at most 8 MiB"):
        decoded("zstd", body)


@pytest.mark.parametrize(("encoding", "empty"), EMPTY, ids=["gzip", "zstd", "skippable"])
def test_the_work_for_empty_members_is_bounded(encoding: str, empty: bytes) -> None:
    decoder, pieces = Decoder(encoding, empty * content_encoding.MOST_MEMBERS), 0
    while not decoder.is_complete:
        decoder.decode(LIMIT)
        pieces += 1
    assert pieces == content_encoding.MOST_MEMBERS / content_encoding.MOST_MEMBERS_OF_A_PIECE and decoder.size == 0
    with pytest.raises(BadRequest, match=f"more than {content_encoding.MOST_MEMBERS} {encoding} streams"):
        decoded(encoding, empty * (content_encoding.MOST_MEMBERS + 1))


def test_a_piece_reads_no_more_than_its_part_of_the_body() -> None:
    body = b"\x00\x00\x00\xff\xff" * 100_000 + b"\x01\x00\x00\xff\xff"
    decoder, pieces = Decoder("deflate", body), 0
    while not decoder.is_complete:
        decoder.decode(LIMIT)
        pieces += 1
    assert pieces == -(-len(body) // content_encoding.LARGEST_PIECE_READ)


async def reading(bodies: Bodies, body: bytes, encoding: bytes, cancel_scope: CancelScope) -> bytes:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = {"headers": [(b"content-encoding", encoding)]}
    return await bodies.read(scope, receive, Record("id", "id", "POST"), cancel_scope)


def test_other_tasks_run_between_the_pieces() -> None:
    async def run() -> tuple[int, int]:
        bodies, others = Bodies(LIMIT * 10, LIMIT), 0

        async def count() -> None:
            nonlocal others
            while True:
                await asyncio.sleep(0)
                others += 1

        counting = asyncio.create_task(count())
        with CancelScope() as cancel_scope:
            size = len(await reading(bodies, gzip.compress(b"0" * LIMIT * 9), b"gzip", cancel_scope))
        counting.cancel()
        assert (bodies.unfinished.used, bodies.unfinished._of) == (0, {})
        return size, others

    size, others = asyncio.run(run())
    assert size == LIMIT * 9 and others > size / content_encoding.LARGEST_PIECE_WRITTEN


def test_a_client_that_leaves_meanwhile_holds_nothing() -> None:
    bodies = Bodies(LIMIT * 10, LIMIT)

    async def run() -> None:
        with CancelScope() as cancel_scope:
            asyncio.get_running_loop().call_later(0.01, cancel_scope.interrupt, ClientGone())
            await reading(bodies, dynamic_blocks(LIMIT), b"deflate", cancel_scope)

    with pytest.raises(ClientGone):
        asyncio.run(run())
    assert (bodies.unfinished.used, bodies.unfinished._of) == (0, {})


def dynamic_blocks(size: int) -> bytes:
    """Many small blocks, each with a code of its own: the most work for the least output."""
    stream, made = zlib.compressobj(level=9, wbits=-zlib.MAX_WBITS), bytearray()
    while len(made) < size:
        made += stream.compress(bytes(range(256)) + b"0" * 300) + stream.flush(zlib.Z_FULL_FLUSH)
    return bytes(made) + stream.flush()


# ── Through a gateway ───────────────────────────────────────────────────────────────────────────────────────

LARGEST = 400_000
CHAT = {"model": MODEL, "messages": MESSAGES, "stream": False}
ROUTES = ["/api/chat", "/v1/chat/completions"]


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, MAX_REQUEST_BODY_BYTES=str(LARGEST))


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.http(gateway.key(flags=(ADMIN, ADMIN_MODELS))) as found:
        yield found


def post(client: httpx.Client, path: str, encoding: str, body: bytes) -> httpx.Response:
    return client.post(path, content=body, headers={"Content-Encoding": encoding, "Content-Type": "application/json"})


def error_of(answer: httpx.Response) -> str:
    error = answer.json()["error"]
    return str(error if isinstance(error, str) else error["message"])


def test_every_route_that_reads_json_takes_compressed_bodies(client: httpx.Client) -> None:
    """An empty object is refused for what is missing, which shows that it has been read."""
    paths = [path for path, operation in registry.operations(registry.dialects()).items() if "/audio/t" not in path]
    assert len(paths) > 15
    for path in paths:
        for encoding, encode in FORMS.values():
            answer = post(client, path, encoding, encode(b"{}"))
            assert answer.status_code == 400 and "model" in error_of(answer), (path, encoding, answer.text)


def test_the_requests_of_codex_are_read_as_it_compresses_them(client: httpx.Client, alpha: FakeBackend) -> None:
    turns = recordings.session("codex").turns("/v1/responses")
    for turn in turns:
        body = json.dumps({**turn, "model": MODEL}).encode()
        for encoded in (zstd.compress(body, 3), streamed_zstd(body)):
            answer = post(client, "/v1/responses", "zstd", encoded)
            assert answer.status_code == 200 and "response.completed" in answer.text, answer.text[:500]
    assert len(turns) > 1 and len(alpha.calls("/v1/chat/completions")) == 2 * len(turns)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("size", [100, 100_000, LARGEST])
def test_compressed_bodies_are_read_on_every_route(
    gateway: RunningGateway, client: httpx.Client, alpha: FakeBackend, path: str, size: int
) -> None:
    body = json.dumps(CHAT).encode().ljust(size)
    for encoding, encode in FORMS.values():
        encoded = encode(body)
        answer = post(client, path, encoding, encoded)
        assert answer.status_code == 200, answer.text
        sent = alpha.requests[-1]
        assert "content-encoding" not in {name.lower() for name, _ in sent.headers}
        gateway.wait_idle()
        assert gateway.audit_rows()[-1]["bytes_in"] == len(encoded), "the bytes on the wire"
    assert gateway.components.bodies.unfinished.used == 0


def test_operators_and_routes_that_change_models_take_compressed_bodies(client: httpx.Client) -> None:
    made = post(client, "/admin/v1/keys", "zstd", zstd.compress(b'{"name": "made"}'))
    assert made.status_code == 201 and made.json()["name"] == "made"
    assert post(client, "/api/pull", "gzip", gzip.compress(b'{"model": "x"}')).status_code == 200
    large = post(client, "/admin/v1/keys", "gzip", gzip.compress(b" " * 70_000))
    assert large.status_code == 413 and error_of(large).endswith("65536 bytes when decompressed")
    digest = "sha256:" + "0" * 64
    upload = post(client, f"/api/blobs/{digest}", "gzip", gzip.compress(b"x"))
    assert upload.status_code == 415 and upload.headers["accept-encoding"] == "identity" and "unencoded" in error_of(upload)


@pytest.mark.parametrize("path", ROUTES)
def test_a_bomb_gets_413_and_leaves_nothing(gateway: RunningGateway, client: httpx.Client, path: str) -> None:
    for _, (encoding, make) in sorted(BOMBS.items()):
        answer = post(client, path, encoding, make())
        assert answer.status_code == 413, answer.text
        assert error_of(answer).endswith(f"larger than {LARGEST} bytes when decompressed; MAX_REQUEST_BODY_BYTES sets that")
        assert answer.headers.get("connection") != "close", "the body has been read"
    unfinished = gateway.components.bodies.unfinished
    assert (unfinished.used, unfinished._of) == (0, {})


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_that_cannot_be_decoded_are_refused_by_name(client: httpx.Client, path: str) -> None:
    body = json.dumps(CHAT).encode().ljust(50_000)
    for encoding, encode in FORMS.values():
        encoded = encode(body)
        for wrong, expected in [
            (b"no such stream", "is not valid"),
            (encoded[:-1], "ends before its"),
            (encoded + b"\0", ""),
            (encode(b""), "the body is empty; send a JSON object"),
            (b"", "the body is empty; send a JSON object"),
            (encode(b"[" * 100), ""),
        ]:
            answer = post(client, path, encoding, wrong)
            assert answer.status_code == 400 and expected in error_of(answer), (encoding, wrong[:20], answer.text)
    for encoding in ("br", "gzip, gzip", "gzip, identity", "compress"):
        answer = post(client, path, encoding, b"{}")
        assert answer.status_code == 415 and "gzip, deflate or zstd" in error_of(answer)
        assert answer.headers["accept-encoding"] == "gzip, deflate, zstd"
    twice = [("Content-Encoding", "gzip"), ("Content-Encoding", "gzip")]
    assert client.post(path, content=gzip.compress(gzip.compress(body)), headers=twice).status_code == 415
    assert post(client, path, "identity", body).status_code == 200


def test_what_is_decoded_counts_towards_the_memory_of_its_key(
    start_gateway: StartGateway, alpha: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BYTES_PER_KEY", "BYTES_IN_ALL", "LARGEST_BODIES_PER_KEY"):
        monkeypatch.setattr(f"gateway.proxy.body.{name}", 0)
    gateway = start_gateway(alpha, MAX_REQUEST_BODY_BYTES=str(LARGEST))
    with gateway.http(gateway.key()) as client:
        answer = post(client, ROUTES[0], "gzip", gzip.compress(json.dumps(CHAT).encode().ljust(300_000)))
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert post(client, ROUTES[0], "gzip", gzip.compress(json.dumps(CHAT).encode())).status_code == 200, (
            "a small one is not held"
        )
    assert gateway.components.bodies.unfinished._of == {}
