"""For each fault of a first backend × dialect × stream and whole, the official client gets the answer of the second backend."""

import json
import time

import httpx
import pytest

from tests.conftest import StartGateway
from tests.support.chat_requests import CHATS, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import (
    FAULTS,
    Close,
    End,
    Forever,
    Head,
    Piece,
    Raw,
    Step,
    answer,
    content_type_of,
    recording,
)

MODELS = ["llama3.2:latest"]
pytestmark = pytest.mark.usual_slots


SILENT = ("head_timeout", "connect_timeout", "frozen")


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("fault", [*FAULTS, "refused", "connect_timeout", "frozen"])
def test_the_second_backend_answers(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, chat: Chat, fault: str
) -> None:
    waits = {"OLLAMA_READ_TIMEOUT_S": "1.5", "OLLAMA_CONNECT_TIMEOUT_S": "1"} if fault in SILENT else {}
    gateway = start_gateway(alpha, beta, **waits)
    key = gateway.key()
    assert chat.ask(gateway, key) == "alpha heard: Say hi"
    break_backend(alpha, fault, chat)
    try:
        assert chat.ask(gateway, key) == "beta heard: Say hi"
    finally:
        if fault in ("frozen", "connect_timeout"):
            alpha.thaw()
    line = gateway.request_lines()[-1]
    assert line["backend"] == "beta" and line["status"] == 200 and line["outcome"] == "answered"
    assert len(line["attempts"]) == 1 and line["attempts"][0]["backend"] == "alpha"


def break_backend(backend: FakeBackend, fault: str, chat: Chat) -> None:
    if fault == "refused":
        backend.stop()
    elif fault == "frozen":
        backend.freeze()
    elif fault == "connect_timeout":
        backend.freeze(accepting=False)
    else:
        backend.play(chat.path, FAULTS[fault](chat.dialect, chat.streamed))


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_a_call_for_a_model_that_is_gone_goes_to_another_backend(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, chat: Chat
) -> None:
    gateway = start_gateway(alpha, beta)
    alpha.play(chat.path, answer(404, {"error": "model 'llama3.2' not found"}))
    assert chat.ask(gateway, gateway.key()) == "beta heard: Say hi"


# Longer than the bound on framing without a body.
EXTENSION = b"5;" + b"x" * 600_000
TWO_LENGTHS = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 20\r\n\r\n" + b'{"done":true}      \n'


@pytest.mark.parametrize("chat", CHATS, ids=str)
@pytest.mark.parametrize("fault", ["cut_short", "not_http"])
def test_a_body_with_endless_or_ambiguous_framing_is_rejected(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, chat: Chat, fault: str
) -> None:
    """Detected long before any timeout: the bytes of a chunk's extension are no progress."""
    gateway = start_gateway(alpha, beta)
    kind = [("Content-Type", content_type_of(chat.dialect, chat.streamed))]
    framing: list[Step] = [Head(200, kind, chunked=True), Raw(EXTENSION), Forever()]
    alpha.play(chat.path, framing if fault == "cut_short" else [Raw(TWO_LENGTHS), Close()])
    assert chat.ask(gateway, gateway.key()) == "beta heard: Say hi"
    attempts = gateway.request_lines()[-1]["attempts"]
    assert [(attempt["backend"], attempt["fault"]) for attempt in attempts] == [("alpha", fault)]


@pytest.mark.parametrize("chat", CHATS[1::2], ids=str)
def test_endless_framing_ends_an_answer_that_has_begun(start_gateway: StartGateway, alpha: FakeBackend, chat: Chat) -> None:
    gateway = start_gateway(alpha)
    name = "ollama_chat_stream.ndjson" if chat.dialect == "ollama" else "openai_chat_stream.sse"
    whole = recording(name)
    first, rest = whole[: len(whole) // 2], whole[len(whole) // 2 :]
    within = [Raw(b"%x;%b\r\n%b\r\n" % (len(part), b"x" * 200_000, part)) for part in (first, rest)]
    begun: list[Step] = [Head(200, [("Content-Type", content_type_of(chat.dialect, True))], chunked=True), Piece(first)]
    with gateway.http(gateway.key()) as client:
        alpha.play(chat.path, [begun[0], *within, End()])
        assert client.post(chat.path, json=chat.body).content.count(b"error") == 0
        alpha.play(chat.path, [*begun, Raw(EXTENSION), Forever()])
        assert b"error" in client.post(chat.path, json=chat.body).content
    assert [(line["outcome"], line["detail"].partition(":")[0]) for line in gateway.request_lines()] == [
        ("answered", ""),
        ("truncated", "broken_off"),
    ]


def test_a_mistake_of_the_caller_is_not_sent_to_another_backend(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    gateway = start_gateway(alpha, beta)
    alpha.play("/api/chat", answer(400, {"error": '"llama3.2" does not support thinking'}))
    with gateway.http(gateway.key()) as client:
        got = client.post("/api/chat", json=CHATS[0].body)
    assert got.status_code == 400 and got.json() == {"error": '"llama3.2" does not support thinking'}
    assert not beta.calls("/api/chat")


def test_a_mistake_of_the_caller_is_reported_in_its_dialect(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    for body, message in [
        (b'{"detail":"too many images"}', "too many images"),
        (b"<html>no</html>", "The model server refused the request."),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
    ]:
        alpha.play("/v1/chat/completions", answer(422, body, "text/html"))
        with gateway.http(gateway.key()) as client:
            got = client.post("/v1/chat/completions", json=CHATS[3].body)
        assert got.status_code == 422 and got.json()["error"]["message"] == message


def test_when_all_backends_are_down_the_answer_is_503_with_retry_after(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key = gateway.key()
    alpha.stop()
    with gateway.http(key) as client:
        for path in ("/api/chat", "/v1/chat/completions"):
            got = client.post(path, json=CHATS[0].body)
            assert got.status_code == 503 and int(got.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("fault", "status"), [("500", 502), ("429", 503), ("503", 503), ("garbage", 502), ("head_timeout", 504), ("reset", 503)]
)
def test_the_error_when_the_only_backend_fails(
    start_gateway: StartGateway, alpha: FakeBackend, fault: str, status: int
) -> None:
    gateway = start_gateway(alpha, **({"OLLAMA_READ_TIMEOUT_S": "0.5"} if fault in SILENT else {}))
    alpha.play("/api/chat", FAULTS[fault]("ollama", True))
    with gateway.http(gateway.key()) as client:
        got = client.post("/api/chat", json=CHATS[1].body)
    assert got.status_code == status
    assert isinstance(got.json()["error"], str) and ("retry-after" in got.headers) == (status == 503)


def test_a_broken_backend_is_skipped_and_tried_again_by_one_probe(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    gateway = start_gateway(alpha, beta)
    key = gateway.key()
    alpha.play("/api/chat", answer(500, {"error": "broken"}))
    for _ in range(6):
        assert CHATS[0].ask(gateway, key) == "beta heard: Say hi"
    assert len(alpha.calls("/api/chat")) == 3
    alpha.play("/api/chat", None)
    breaker = gateway.components.backends["alpha"].breaker
    assert breaker.state == "open"
    breaker._open_until = time.monotonic()
    assert CHATS[0].ask(gateway, key) == "alpha heard: Say hi"
    assert breaker.state == "closed"


def test_the_last_backend_of_a_model_is_never_ejected(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    key = gateway.key()
    alpha.play("/api/chat", answer(500, {"error": "broken"}))
    with gateway.http(key) as client:
        for _ in range(8):
            assert client.post("/api/chat", json=CHATS[0].body).status_code == 502
    alpha.play("/api/chat", None)
    assert CHATS[0].ask(gateway, key) == "alpha heard: Say hi"


def test_calls_for_a_full_backend_go_to_the_next(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    gateway = start_gateway(alpha, beta, OLLAMA_MAX_CONNECTIONS="1")
    key = gateway.key()
    alpha.healthy.pieces, alpha.healthy.pause_s = 30, 0.1
    with gateway.http(key) as client, client.stream("POST", "/api/chat", json=CHATS[1].body) as slow:
        pieces = slow.iter_bytes()
        next(pieces)
        assert CHATS[0].ask(gateway, key) == "beta heard: Say hi"
        assert alpha.in_flight == 1


def test_two_backends_never_work_on_one_request_at_the_same_time(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    gateway = start_gateway(alpha, beta, OLLAMA_READ_TIMEOUT_S="0.7")
    alpha.play("/api/chat", FAULTS["head_timeout"]("ollama", True))
    assert CHATS[1].ask(gateway, gateway.key()) == "beta heard: Say hi"
    assert alpha.wait_idle(1.0)
    left, asked = alpha.calls("/api/chat")[0], beta.calls("/api/chat")[0]
    assert left.outcome == "client_left" and left.finished is not None
    assert left.finished <= asked.started + 0.5


def test_a_stale_connection_is_replaced(start_gateway: StartGateway) -> None:
    with FakeBackend(models=MODELS, name="alpha", close_idle_as_request_arrives=True) as alpha:
        gateway = start_gateway(alpha)
        limits = httpx.Limits(max_connections=4)
        with gateway.http(gateway.key(), limits=limits) as client:
            for _ in range(300):
                assert client.post("/api/chat", json=CHATS[0].body).status_code == 200
        alpha.wait_idle(1.0)
        assert alpha.stale_resets > 100
        answered = [request for request in alpha.calls("/api/chat") if request.outcome == "answered"]
        assert len(answered) == 300


@pytest.mark.parametrize("chat", CHATS[:2], ids=str)
def test_attempts_are_recorded_when_the_client_leaves(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend, chat: Chat
) -> None:
    """The first backend has failed and the second is at work when the client leaves: it pays for the prompt."""
    gateway = start_gateway(alpha, beta)
    alpha.play(chat.path, answer(500, {"error": "broken"}))
    beta.play(chat.path, FAULTS["head_timeout"](chat.dialect, chat.streamed))
    with gateway.http(gateway.key()) as client, pytest.raises(httpx.ReadTimeout):
        client.post(chat.path, json=chat.body, timeout=1.5)
    gateway.wait_idle()
    [row] = gateway.audit_rows()
    assert (row["outcome"], row["backend"], row["answered_as"]) == ("client_gone", "", "")
    assert [(attempt["backend"], attempt["fault"]) for attempt in json.loads(row["attempts"])] == [("alpha", "bad_status")]
    assert row["tokens_from"] == "partial" and row["prompt_tokens"] > 0
    # Of a whole answer a second of work is estimated, of a stream nothing was relayed.
    assert (row["completion_tokens"] > 0) == (not chat.streamed)
