"""Rerankers, images, speech and transcriptions through the gateway: to the servers that have these routes."""

import base64
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway.dialects.openai_media import LAST_EVENTS
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.media_routes import PIXEL
from tests.support.fake_backend.scripts import FAULTS, End, Forever, Head, Pause, Piece, Reset, answer, cut_at, sse
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


@pytest.fixture
def beta() -> Iterator[FakeBackend]:
    with FakeBackend(kind="openai", models=[MODEL], name="beta") as backend:
        yield backend


@pytest.fixture
def gamma() -> Iterator[FakeBackend]:
    with FakeBackend(kind="openai", models=[MODEL.lower()], name="gamma") as backend:
        yield backend


@pytest.fixture
def gateway(start_gateway: StartGateway, beta: FakeBackend, gamma: FakeBackend) -> RunningGateway:
    return start_gateway(beta, gamma)


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
    assert got.json()["error"]["message"] == "The servers with this model do not have this route."
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
