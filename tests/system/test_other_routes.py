"""Rerankers, images, speech and transcriptions through the gateway: to the servers that have these routes."""

import base64
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from gateway.dialects.openai_media import LAST_EVENTS
from gateway.proxy import upload_exchange
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.media_routes import PIXEL
from tests.support.fake_backend.scripts import FAULTS, End, Forever, Head, Pause, Piece, Reset, answer, cut_at, sse
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "BAAI/bge-reranker"
DOCUMENTS = ["The moon pulls the sea.", "Bread needs salt.", "Ships wait for high water."]
RERANK: dict[str, Any] = {"model": MODEL, "query": "tides", "documents": DOCUMENTS}
IMAGE: dict[str, Any] = {"model": MODEL, "prompt": "a lighthouse in a storm"}
SPEECH: dict[str, Any] = {"model": MODEL, "input": "Good morning", "voice": "alloy"}
SOUND = b"beta heard: Good morning"
RERANKS = ["/v1/rerank", "/rerank", "/v2/rerank"]
# What servers without a route answer: llama.cpp, FastAPI, Ollama and proxies; LM Studio, with status 200.
MISSING = [
    answer(404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}),
    answer(404, {"detail": "Not Found"}),
    answer(404, b"404 page not found", "text/plain"),
    answer(405, b"405 method not allowed", "text/plain"),
    answer(200, {"error": "Unexpected endpoint or method. (POST /v1/rerank)"}),
]


class Started(NamedTuple):
    beta: FakeBackend
    gamma: FakeBackend
    gateway: RunningGateway


@pytest.fixture(scope="module")
def started(start_shared_gateway: StartGateway) -> Iterator[Started]:
    first = FakeBackend(kind="openai", models=[MODEL], name="beta")
    second = FakeBackend(kind="openai", models=[MODEL.lower()], name="gamma")
    with first, second:
        yield Started(first, second, start_shared_gateway(first, second, MAX_UPLOAD_BYTES=str(LARGEST)))


@pytest.fixture
def beta(started: Started) -> FakeBackend:
    started.beta.renew()
    return started.beta


@pytest.fixture
def gamma(started: Started) -> FakeBackend:
    started.gamma.renew()
    return started.gamma


@pytest.fixture
def gateway(started: Started, beta: FakeBackend, gamma: FakeBackend) -> RunningGateway:
    started.gateway.renew()
    return started.gateway


@pytest.mark.parametrize("path", RERANKS)
def test_a_ranking_comes_from_a_server_that_has_the_route(gateway: RunningGateway, beta: FakeBackend, path: str) -> None:
    with gateway.http(gateway.key(tpm=1000)) as client:
        got = client.post(path, json={**RERANK, "model": MODEL.upper(), "top_n": 2})
    assert got.status_code == 200 and [result["index"] for result in got.json()["results"]] == [0, 1]
    (sent,) = beta.calls(path)
    assert sent.json == {**RERANK, "top_n": 2}
    (row,) = gateway.audit_rows()
    assert (row["route"], row["dialect"], row["backend"], row["tokens_from"]) == (path, "openai", "beta", "reported")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (got.json()["usage"]["total_tokens"], 0)


def test_a_ranking_without_counts_or_with_their_sum_alone(gateway: RunningGateway, beta: FakeBackend) -> None:
    ranks = [{"index": 0, "score": 0.0}]
    beta.play_once("/rerank", answer(200, ranks), answer(200, {"results": ranks, "usage": {"total_tokens": 41}}))
    with gateway.http(gateway.key()) as client:
        assert client.post("/rerank", json={"model": MODEL, "query": "tides", "texts": DOCUMENTS}).json() == ranks
        assert client.post("/rerank", json=RERANK).status_code == 200
    estimated, reported = gateway.audit_rows()
    assert estimated["tokens_from"] == "estimated" and 0 < estimated["prompt_tokens"] < 60
    assert (reported["prompt_tokens"], reported["tokens_from"]) == (41, "reported")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/rerank", {"documents": DOCUMENTS}, "'query' is missing"),
        ("/rerank", {"query": "tides"}, "'documents' is missing"),
        ("/rerank", {"query": "tides", "documents": "one"}, "'documents' must be a list"),
        ("/rerank", {"query": 1, "documents": DOCUMENTS}, "'query' must be"),
        ("/rerank", {"query": "tides", "documents": DOCUMENTS, "top_n": "2"}, "'top_n' must be"),
        ("/rerank", {"query": "tides", "documents": DOCUMENTS, "lora": "x"}, "'lora' is not allowed"),
        ("/v1/images/generations", {}, "'prompt' is missing"),
        ("/v1/images/generations", {"prompt": ["a"]}, "'prompt' must be a string"),
        ("/v1/images/generations", {"prompt": "a", "n": 11}, "'n' must be an integer from 1 to 10"),
        ("/v1/images/generations", {"prompt": "a", "stream": "yes"}, "'stream' must be true or false"),
        ("/v1/audio/speech", {"voice": "alloy"}, "'input' is missing"),
        ("/v1/audio/speech", {"input": ["a"]}, "'input' must be a string"),
        ("/v1/audio/speech", {"input": "a", "voice": 1}, "'voice' must be"),
        ("/v1/audio/speech", {"input": "a", "stream_format": "raw"}, "'stream_format' must be 'audio' or 'sse'"),
        ("/v1/audio/speech", {"input": "a", "Stream_Format": "sse"}, "must be written 'stream_format'"),
    ],
)
def test_what_is_wrong_is_named(gateway: RunningGateway, beta: FakeBackend, path: str, body: Any, words: str) -> None:
    with gateway.http(gateway.key()) as client:
        got = client.post(path, json={"model": MODEL, **body})
    assert got.status_code == 400 and words in got.json()["error"]["message"]
    assert not beta.calls(path)


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("path", ["/v1/rerank", "/v1/images/generations", "/v1/audio/speech"])
def test_servers_without_the_route_are_skipped_and_not_punished(
    gateway: RunningGateway, beta: FakeBackend, gamma: FakeBackend, path: str, missing: Any
) -> None:
    beta.play(path, missing)
    body = RERANK | IMAGE | SPEECH
    with gateway.http(gateway.key()) as client:
        for _ in range(4):
            assert client.post(path, json=body).status_code == 200
        assert len(gamma.calls(path)) == 4 and gamma.calls(path)[0].json["model"] == MODEL.lower()
        gamma.play(path, missing)
        got = client.post(path, json=body)
        assert client.post(
            "/v1/chat/completions", json={"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        ).is_success
    assert (got.status_code, got.json()["error"]["code"]) == (400, "route_not_served")
    assert got.json()["error"]["message"].startswith("The servers with this model do not have this route")
    assert all(backend.breaker.state == "closed" for backend in gateway.components.backends.values())


def test_a_model_that_one_server_lost_and_a_route_that_the_other_lacks(
    gateway: RunningGateway, beta: FakeBackend, gamma: FakeBackend
) -> None:
    gone = {"error": {"message": f"The model `{MODEL}` does not exist.", "type": "NotFoundError", "code": 404}}
    beta.play("/v1/rerank", answer(404, gone))
    gamma.play("/v1/rerank", MISSING[1])
    with gateway.http(gateway.key()) as client:
        assert client.post("/v1/rerank", json=RERANK).status_code == 503
        gamma.stop()
        beta.play("/v1/rerank", MISSING[1])
        assert client.post("/v1/rerank", json=RERANK).status_code == 503


@pytest.mark.parametrize("fault", ["500", "503", "reset", "garbage", "error_first_frame"])
@pytest.mark.parametrize("stream", [False, True])
def test_images_come_from_the_second_server_after_a_failure(
    gateway: RunningGateway, beta: FakeBackend, fault: str, stream: bool
) -> None:
    beta.play("/v1/images/generations", FAULTS[fault]("openai", stream))
    with gateway.openai(gateway.key()) as client:
        if stream:
            events = list(client.images.generate(**IMAGE, stream=True))
            assert [event.type for event in events][-1] in LAST_EVENTS and events[-1].usage.output_tokens == 7
        else:
            assert client.images.generate(**IMAGE, n=2).data[1].b64_json == PIXEL
    (row,) = gateway.audit_rows()
    assert (row["backend"], row["outcome"], row["stream"]) == ("gamma", "answered", stream)
    assert (row["prompt_tokens"], row["completion_tokens"], row["tokens_from"]) == (5, 7, "reported")


def test_a_stream_of_images_that_ends_early_says_so(gateway: RunningGateway, beta: FakeBackend) -> None:
    partial = sse([{"type": "image_generation.partial_image", "b64_json": PIXEL, "partial_image_index": 0}], done=False)
    beta.play("/v1/images/generations", cut_at(b"".join(partial) * 2, len(partial[0])))
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/images/generations", json={**IMAGE, "stream": True})
    assert got.status_code == 200 and "upstream_ended_early" in got.text
    (row,) = gateway.audit_rows()
    assert row["outcome"] == "truncated"


def test_limits_count_rankings(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(rpm=2, tpm=100)) as client:
        assert client.post("/v1/rerank", json={**RERANK, "documents": ["word " * 400]}).status_code == 429
        assert [client.post("/v1/rerank", json=RERANK).status_code for _ in range(3)] == [200, 200, 429]


def test_speech_is_streamed_to_the_official_client(gateway: RunningGateway, beta: FakeBackend) -> None:
    with gateway.openai(gateway.key()) as client:
        assert client.audio.speech.create(**SPEECH).content == SOUND
        with client.audio.speech.with_streaming_response.create(**SPEECH, response_format="mp3") as got:
            assert got.headers["content-type"] == "audio/mpeg" and got.headers["x-content-type-options"] == "nosniff"
            assert b"".join(got.iter_bytes()) == SOUND
    row = gateway.audit_rows()[-1]
    assert (row["backend"], row["outcome"], row["bytes_out"], row["stream"]) == ("beta", "answered", len(SOUND), False)
    assert (row["prompt_tokens"], row["completion_tokens"], row["tokens_from"]) == (3, 0, "estimated")
    assert beta.calls("/v1/audio/speech")[0].json == SPEECH


def test_speech_arrives_as_it_is_made(gateway: RunningGateway, beta: FakeBackend) -> None:
    head = Head(200, [("Content-Type", "audio/wav")], chunked=True)
    beta.play("/v1/audio/speech", [head, Piece(b"one"), Pause(1.0), Piece(b"two"), End()])
    with gateway.http(gateway.key()) as client, client.stream("POST", "/v1/audio/speech", json=SPEECH) as got:
        began = time.monotonic()
        pieces = got.iter_raw()
        assert next(pieces) == b"one" and time.monotonic() - began < 0.7
        assert next(pieces) == b"two"


def test_speech_as_events(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/audio/speech", json={**SPEECH, "stream_format": "sse"})
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.text.count("speech.audio.delta") == 4 and '"speech.audio.done"' in got.text and '"usage"' in got.text
    (row,) = gateway.audit_rows()
    assert (row["prompt_tokens"], row["completion_tokens"], row["tokens_from"], row["outcome"]) == (
        3,
        5,
        "reported",
        "answered",
    )


def test_a_server_may_answer_with_audio_where_events_were_asked_for(gateway: RunningGateway, beta: FakeBackend) -> None:
    beta.play("/v1/audio/speech", answer(200, b"\0\1", "audio/wav"))
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/audio/speech", json={**SPEECH, "stream_format": "sse"})
    assert (got.content, got.headers["content-type"], got.headers["content-length"]) == (b"\0\1", "audio/wav", "2")


@pytest.mark.parametrize(
    "bad",
    [
        answer(200, {"error": {"message": "the voice engine stopped", "type": "server_error"}}),
        answer(200, {"audio": base64.b64encode(SOUND).decode()}),
        answer(200, b"<html>", "text/html"),
        answer(200, b"", "audio/mpeg"),
        answer(200, b"\x1f\x8b", "audio/mpeg", ("Content-Encoding", "gzip")),
        answer(200, b"\0\1", ""),
        answer(500, {"error": "out of memory"}),
        [Head(200, [("Content-Type", "audio/mpeg")], chunked=True), Reset()],
    ],
)
def test_speech_comes_from_the_second_server_after_a_failure(gateway: RunningGateway, beta: FakeBackend, bad: Any) -> None:
    beta.play("/v1/audio/speech", bad)
    with gateway.http(gateway.key()) as client:
        got = client.post("/v1/audio/speech", json=SPEECH)
    assert got.content == b"gamma heard: Good morning"
    (row,) = gateway.audit_rows()
    assert row["backend"] == "gamma" and "beta" in row["attempts"]


@pytest.mark.parametrize("framing", ["chunked", "mid_chunk", "length"])
def test_speech_that_breaks_off_ends_the_connection(gateway: RunningGateway, beta: FakeBackend, framing: Any) -> None:
    beta.play("/v1/audio/speech", cut_at(b"sound" * 1000, 2000, "close", "audio/mpeg", framing))
    with gateway.http(gateway.key()) as client, pytest.raises(httpx.RemoteProtocolError):
        client.post("/v1/audio/speech", json=SPEECH)
    (row,) = gateway.audit_rows()
    assert (row["outcome"], row["status"], row["bytes_out"]) == ("truncated", 200, 2000)
    assert row["detail"].startswith("broken_off")


def test_silence_within_speech_ends_it(start_gateway: StartGateway, beta: FakeBackend) -> None:
    gateway = start_gateway(beta, OLLAMA_IDLE_TIMEOUT_S="1")
    beta.play("/v1/audio/speech", [Head(200, [("Content-Type", "audio/mpeg")], chunked=True), Piece(b"one"), Forever()])
    with gateway.http(gateway.key()) as client, pytest.raises(httpx.RemoteProtocolError):
        client.post("/v1/audio/speech", json=SPEECH)
    (row,) = gateway.audit_rows()
    assert (row["outcome"], row["detail"]) == ("truncated", "upstream_timeout")


def test_a_client_that_leaves_during_speech_ends_the_call(gateway: RunningGateway, beta: FakeBackend) -> None:
    head = Head(200, [("Content-Type", "audio/mpeg")], chunked=True)
    beta.play("/v1/audio/speech", [head, Piece(b"one"), Forever()])
    with gateway.http(gateway.key(concurrent=1)) as client:
        with client.stream("POST", "/v1/audio/speech", json=SPEECH) as got:
            assert next(got.iter_raw()) == b"one"
        assert beta.wait_idle() and beta.calls("/v1/audio/speech")[0].outcome == "client_left"
        gateway.wait_idle()
        assert client.post("/v1/rerank", json=RERANK).status_code == 200
    assert gateway.audit_rows()[0]["outcome"] == "client_gone"


# Transcriptions

TRANSCRIBE = "/v1/audio/transcriptions"
PATHS = [TRANSCRIBE, "/v1/audio/translations"]
BOUNDARY = "x-y-z"
CONTENT_TYPE = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
# More than stays in memory.
RECORDING = os.urandom(1_500_000)
LARGEST = 2_000_000


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


def open_files() -> int:
    """Temporary files that this process has open; they have no names."""
    links = (os.path.realpath(number) for number in Path("/proc/self/fd").iterdir())
    return sum(link.startswith(str(tempfile.tempdir)) for link in links)


@pytest.fixture(autouse=True)
def temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def uploads(gateway: RunningGateway) -> RunningGateway:
    return gateway


def test_the_official_client_transcribes(uploads: RunningGateway, beta: FakeBackend) -> None:
    with uploads.openai(uploads.key()) as client:
        file = ("a.wav", RECORDING)
        whole = client.audio.transcriptions.create(model=MODEL.upper(), file=file, language="en", temperature=0.5)
        assert whole.text == "beta heard: 1500000 bytes" and whole.usage.seconds == 2
        with pytest.deprecated_call():
            assert client.audio.translations.create(model=MODEL, file=file).text == whole.text
        assert client.audio.transcriptions.create(model=MODEL, file=file, response_format="text") == whole.text
        events = list(client.audio.transcriptions.create(model=MODEL, file=file, stream=True))
        assert [event.type for event in events] == ["transcript.text.delta"] * 4 + ["transcript.text.done"]
        more: Any = {"timestamp_granularities": ["word", "segment"], "response_format": "verbose_json"}
        assert client.audio.transcriptions.create(model=MODEL, file=file, **more).text == whole.text
    (first, *_) = beta.calls(TRANSCRIBE)
    assert int(first.header("content-length") or 0) == len(first.body) and first.header("transfer-encoding") is None
    assert RECORDING in first.body and MODEL.encode() in first.body and MODEL.upper().encode() not in first.body
    rows = uploads.audit_rows()
    assert {row["outcome"] for row in rows} == {"answered"} and {row["backend"] for row in rows} == {"beta"}
    assert rows[0]["model"] == MODEL.upper() and rows[0]["bytes_in"] > len(RECORDING)
    assert (rows[0]["tokens_from"], rows[3]["tokens_from"], rows[3]["stream"]) == ("none", "reported", True)
    assert (rows[3]["prompt_tokens"], rows[3]["completion_tokens"]) == (14, 4)
    assert not uploads.components.bodies.uploads.used and not open_files()


@pytest.mark.parametrize(
    ("limit", "status"), [("32768", 200), ("1", 200), ("32769", 400), ("0", 400), ("-1", 400), ("many", 400)]
)
def test_a_form_asks_for_no_longer_answer_than_the_gateway_allows(uploads: RunningGateway, limit: str, status: int) -> None:
    with uploads.http(uploads.key()) as client:
        data = {"model": MODEL, "max_completion_tokens": limit}
        got = client.post(TRANSCRIBE, data=data, files={"file": b"sound"})
    assert got.status_code == status
    assert (status == 200) or "'max_completion_tokens' must be an integer from 1 to 32768" in got.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("size", [0, 10, 1_500_000])
def test_everything_but_the_model_is_sent_byte_for_byte(
    uploads: RunningGateway, beta: FakeBackend, gamma: FakeBackend, path: str, size: int
) -> None:
    """Also where the model comes after the file, and a second backend spells it differently."""
    beta.play(path, FAULTS["500"]("openai", False))
    file = part("file", RECORDING[:size], '; filename="a.wav"')
    with uploads.http(uploads.key(), headers=CONTENT_TYPE) as client:
        for order in (
            [file, part("prompt", b"tides"), part("model", MODEL.upper().encode())],
            [part("model", MODEL.encode()), file],
        ):
            sent = form(*order)
            assert client.post(path, content=sent).json()["text"] == f"gamma heard: {size} bytes"
            seen_by = [backend.calls(path)[-1] for backend in (beta, gamma)]
            for request, spelling in zip(seen_by, (MODEL, MODEL.lower()), strict=True):
                asked = MODEL.upper() if order[0] is file else MODEL
                assert request.body == sent.replace(asked.encode(), spelling.encode())
                assert request.header("content-type") == CONTENT_TYPE["Content-Type"]
    assert all(row["backend"] == "gamma" and "beta" in row["attempts"] for row in uploads.audit_rows())


@pytest.mark.parametrize(("form_of", "kind"), [("text", "text/plain"), ("srt", "application/x-subrip"), ("vtt", "text/vtt")])
def test_answers_of_other_types(uploads: RunningGateway, form_of: str, kind: str) -> None:
    with uploads.http(uploads.key()) as client:
        got = client.post(TRANSCRIBE, data={"model": MODEL, "response_format": form_of}, files={"file": b"sound"})
    assert got.text == "beta heard: 5 bytes" and got.headers["content-type"].startswith(kind)
    assert got.headers["x-content-type-options"] == "nosniff"


def test_silence_is_an_empty_text_and_a_page_is_no_answer(uploads: RunningGateway, beta: FakeBackend) -> None:
    beta.play_once(TRANSCRIBE, answer(200, b"", "text/plain"), answer(200, b"<html>", "text/html"))
    with uploads.http(uploads.key()) as client:
        assert client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": b"sound"}).content == b""
        assert client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": b"sound"}).json()["text"].startswith("gamma")


def test_ollama_answers_whole_where_a_stream_was_asked_for(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        got = client.post(TRANSCRIBE, data={"model": "llama3.2", "stream": "True"}, files={"file": b"sound"})
        assert got.json() == {"text": "alpha heard: 5 bytes"} and got.headers["content-length"]
        assert client.post(PATHS[1], data={"model": "llama3.2"}, files={"file": b"sound"}).status_code == 200
        assert (
            client.post("/v1/audio/speech", json={"model": "llama3.2", "input": "a"}).json()["error"]["code"]
            == "route_not_served"
        )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "'model' is missing"),
        ({"model": ""}, "'model' is missing"),
        ({"model": "x" * 400}, "'model' must be a string"),
        ({"model": "a\tb"}, "'model' must be a string"),
        ({"model": ["a", "b"]}, "'model' occurs twice"),
        ({"Model": "a"}, "must be written 'model'"),
        ({"model[]": "a"}, "'model[]' is not allowed"),
        ({"model": MODEL, "model[0]": "a"}, "'model[0]' is not allowed"),
        ({"model": MODEL, "lora": "a"}, "'lora' is not allowed"),
        ({"model": MODEL, "priority": "1"}, "'priority' must be 0"),
        ({"model": MODEL, "extra_body": "{}"}, "'extra_body' must be an object"),
        ({"model": MODEL, "stream": "1"}, "'stream' must be true or false"),
        ({"model": MODEL, "n": "2"}, "'n' must be 1"),
        ({"model": MODEL, "stream_options": "{}"}, "'stream_options' is not allowed"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_wrong_fields_are_named(
    uploads: RunningGateway, beta: FakeBackend, path: str, fields: dict[str, Any], words: str
) -> None:
    with uploads.http(uploads.key()) as client:
        got = client.post(path, data=fields, files={"file": b"sound"})
    assert got.status_code == 400 and words in got.json()["error"]["message"]
    assert not beta.calls(path) and not uploads.components.bodies.uploads.used


def test_a_model_or_a_setting_that_is_a_file_and_a_form_without_one(uploads: RunningGateway) -> None:
    with uploads.http(uploads.key()) as client:
        got = client.post(TRANSCRIBE, content=form(part("model", MODEL.encode())), headers=CONTENT_TYPE)
        assert got.status_code == 400 and "'file' is missing" in got.json()["error"]["message"]
        got = client.post(TRANSCRIBE, files={"model": MODEL.encode()})
        assert got.status_code == 400 and "not a file" in got.json()["error"]["message"]
        for name in ("lora", "stream"):
            got = client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": b"sound", name: b"true"})
            assert got.status_code == 400 and name in got.json()["error"]["message"]


@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data", "", "text/plain"])
def test_what_is_not_a_form_is_refused(uploads: RunningGateway, content_type: str) -> None:
    with uploads.http(uploads.key()) as client:
        got = client.post(TRANSCRIBE, content=b'{"model": "x"}', headers={"Content-Type": content_type})
        assert got.status_code == 400 and got.json()["error"]["code"] == "bad_request"
        for encoding in ("gzip", "br"):
            encoded = client.post(TRANSCRIBE, content=b"x", headers={**CONTENT_TYPE, "Content-Encoding": encoding})
            assert (encoded.status_code, encoded.headers["accept-encoding"]) == (415, "identity")
            assert encoded.json()["error"]["message"].endswith("send it unencoded.")


def test_a_form_that_is_too_large_is_refused_by_its_length_or_while_it_arrives(uploads: RunningGateway) -> None:
    body = form(part("model", MODEL.encode()), part("file", b"x" * LARGEST, '; filename="a"'))
    with uploads.http(uploads.key(), headers=CONTENT_TYPE) as client:
        for content in (body, iter([body[:1_000_000], body[1_000_000:]])):
            got = client.post(TRANSCRIBE, content=content)
            assert got.status_code == 413 and "MAX_UPLOAD_BYTES" in got.json()["error"]["message"]
        assert client.post(
            TRANSCRIBE, content=form(part("model", MODEL.encode()), part("file", b"x", '; filename="a"'))
        ).is_success
    uploads.wait_idle()
    assert not uploads.components.bodies.uploads.used and not open_files()


def test_forms_of_a_key_are_bounded_together(uploads: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads.components.bodies.uploads, "most_of_a_key", 1_000_000)
    body = form(part("model", MODEL.encode()), part("file", RECORDING, '; filename="a"'))
    with uploads.http(uploads.key(), headers=CONTENT_TYPE) as client:
        got = client.post(TRANSCRIBE, content=body)
    assert (got.status_code, got.json()["error"]["code"]) == (429, "bodies_unfinished")
    assert not uploads.components.bodies.uploads.used and not open_files()


def head_of(key: str, length: int) -> bytes:
    lines = [f"POST {TRANSCRIBE} HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {length}"]
    return "\r\n".join([*lines, f"Content-Type: {CONTENT_TYPE['Content-Type']}", "", ""]).encode()


def test_a_client_that_leaves_during_its_upload(uploads: RunningGateway, beta: FakeBackend) -> None:
    body = form(part("model", MODEL.encode()), part("file", RECORDING, '; filename="a"'))
    host, port = uploads.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head_of(uploads.key(), len(body)) + body[:1_200_000])
        until(lambda: uploads.components.bodies.uploads.used > 1_200_000 - 65_536 and open_files() == 1)
    uploads.wait_idle()
    assert not uploads.components.bodies.uploads.used and not open_files() and not beta.calls(TRANSCRIBE)
    (row,) = uploads.audit_rows()
    assert row["outcome"] == "client_gone"


def test_a_client_that_stops_sending(uploads: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_exchange, "PIECE_DEADLINE_S", 0.5)
    host, port = uploads.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.settimeout(10)
        connection.sendall(head_of(uploads.key(), 1000) + part("model", MODEL.encode()))
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
    uploads.wait_idle()
    assert not uploads.components.bodies.uploads.used


def test_a_client_that_leaves_while_a_backend_transcribes(uploads: RunningGateway, beta: FakeBackend) -> None:
    beta.play(TRANSCRIBE, [Forever()])
    key = uploads.key(concurrent=1)
    with uploads.http(key) as client, pytest.raises(httpx.ReadTimeout):
        client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": RECORDING}, timeout=1)
    assert beta.wait_idle() and beta.calls(TRANSCRIBE)[0].outcome == "client_left"
    uploads.wait_idle()
    assert not uploads.components.bodies.uploads.used and not open_files()
    beta.play(TRANSCRIBE, None)
    with uploads.http(key) as client:
        assert client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": RECORDING}).is_success
    assert [row["outcome"] for row in uploads.audit_rows()] == ["client_gone", "answered"]


@pytest.mark.parametrize("fault", ["reset", "503", "garbage", "reset_after_head"])
def test_a_second_backend_transcribes_after_a_failure(uploads: RunningGateway, beta: FakeBackend, fault: str) -> None:
    beta.play(TRANSCRIBE, FAULTS[fault]("openai", False))
    with uploads.openai(uploads.key()) as client:
        assert client.audio.transcriptions.create(model=MODEL, file=RECORDING).text.startswith("gamma heard: 1500000")


def test_a_backend_that_stops_reading_or_never_answers(
    start_gateway: StartGateway, beta: FakeBackend, gamma: FakeBackend
) -> None:
    gateway = start_gateway(beta, gamma, OLLAMA_READ_TIMEOUT_S="2")
    with gateway.openai(gateway.key()) as client:
        beta.play(TRANSCRIBE, [Forever()])
        assert client.audio.transcriptions.create(model=MODEL, file=RECORDING).text.startswith("gamma")
        beta.freeze()
        try:
            assert client.audio.transcriptions.create(model=MODEL, file=RECORDING * 5).text.startswith("gamma")
        finally:
            beta.thaw()
    gateway.wait_idle()
    assert not open_files()


def test_a_transcript_that_breaks_off_ends_the_connection_or_says_so(uploads: RunningGateway, beta: FakeBackend) -> None:
    events = b"".join(sse([{"type": "transcript.text.delta", "delta": "a"}] * 3, done=False))
    beta.play_once(TRANSCRIBE, cut_at(b"word " * 100, 200, "close", "text/plain", "length"), cut_at(events, len(events)))
    with uploads.http(uploads.key()) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": b"sound"})
        got = client.post(TRANSCRIBE, data={"model": MODEL, "stream": "true"}, files={"file": b"sound"})
        assert got.status_code == 200 and "upstream_ended_early" in got.text
    assert [row["outcome"] for row in uploads.audit_rows()] == ["truncated"] * 2


def test_a_full_disk_is_reported_and_nothing_is_kept(uploads: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, *rest: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", full)
    body = form(part("model", MODEL.encode()), part("file", RECORDING, '; filename="a"'))
    with uploads.http(uploads.key(), headers=CONTENT_TYPE) as client:
        got = client.post(TRANSCRIBE, content=body)
    assert (got.status_code, got.json()["error"]["code"]) == (503, "overloaded")
    assert not uploads.components.bodies.uploads.used
    assert any("temporary files: No space left" in record.getMessage() for record in uploads.logged.records)


def test_forms_count_as_requests_and_take_a_slot(uploads: RunningGateway, beta: FakeBackend) -> None:
    with uploads.http(uploads.key(rpm=2)) as client:
        found = [client.post(TRANSCRIBE, data={"model": MODEL}, files={"file": b"sound"}) for _ in range(3)]
    assert [got.status_code for got in found] == [200, 200, 429]
    assert found[0].headers["x-ratelimit-remaining-requests"] == "1"


def test_an_alias_names_the_model_of_any_route(start_gateway: StartGateway, beta: FakeBackend) -> None:
    gateway = start_gateway(beta, MODEL_ALIASES=f'{{"whisper-1": "{MODEL}"}}')
    with gateway.openai(gateway.key()) as client:
        assert client.audio.transcriptions.create(model="whisper-1", file=b"sound").text == "beta heard: 5 bytes"
        assert client.audio.speech.create(**{**SPEECH, "model": "whisper-1"}).content == SOUND
        got = client.post("/rerank", body={**RERANK, "model": "whisper-1"}, cast_to=httpx.Response)
        assert got.json()["model"] == "whisper-1"


def test_a_large_body_that_is_no_form_is_refused_at_its_beginning(uploads: RunningGateway) -> None:
    with uploads.http(uploads.key(), headers=CONTENT_TYPE) as client:
        for _ in range(3):
            got = client.post(TRANSCRIBE, content=RECORDING)
            assert got.status_code == 400 and "does not begin with the boundary" in got.json()["error"]["message"]
    assert {row["bytes_in"] < len(RECORDING) for row in uploads.audit_rows()} == {True}


@pytest.mark.parametrize("end", [b"", b"Connection: close\r\n"])
def test_a_backend_that_answers_before_it_has_the_form(
    start_gateway: StartGateway, gamma: FakeBackend, beta: FakeBackend, end: bytes
) -> None:
    """It is closed, whatever else it has not read, and nothing of the form is kept."""
    gateway = start_gateway(beta, gamma)
    refusal = b'{"error": {"message": "the disk is full", "type": "server_error"}}'
    head = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n"
    beta.stop()
    with socket.create_server(("127.0.0.1", beta.port)) as listener:

        def answer_at_once() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(head % (end, len(refusal)) + refusal)
                time.sleep(0.5)

        thread = threading.Thread(target=answer_at_once, daemon=True)
        thread.start()
        with gateway.openai(gateway.key()) as client:
            assert client.audio.transcriptions.create(model=MODEL, file=RECORDING * 5).text.startswith("gamma heard")
        thread.join(5)
    gateway.wait_idle()
    assert not gateway.components.bodies.uploads.used and not open_files()
    assert not [record for record in gateway.logged.records if record.levelname == "ERROR" and record.name != "gateway.store"]
