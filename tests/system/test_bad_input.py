"""Bad input gets a clear error in the caller's dialect, and no input causes a 500."""

import json
import socket
from collections.abc import Iterator

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.auth import key_format
from gateway.core.errors import GatewayError
from gateway.dialects.dialect import read_call
from gateway.dialects.ollama import Ollama
from gateway.dialects.openai import OpenAI
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.running_gateway import RunningGateway

OLLAMA_CHAT, OPENAI_CHAT = "/api/chat", "/v1/chat/completions"
GOOD = '"messages":[{"role":"user","content":"hi"}]'


@pytest.fixture(scope="module")
def alpha() -> Iterator[FakeBackend]:
    with FakeBackend(models=["a:latest"], name="alpha") as backend:
        yield backend


@pytest.fixture(scope="module")
def gateway(start_shared_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_shared_gateway(alpha)


def message(got: httpx.Response) -> str:
    error = got.json()["error"]
    return str(error["message"] if isinstance(error, dict) else error)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "empty"),
        (b"{", "not valid JSON"),
        (b"not json", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'\xef\xbb\xbf{"model":"a"}', "not valid JSON"),
        (b'{"model":"\xff"}', "not valid UTF-8"),
        ('{"model":"a"}'.encode("utf-16"), "not valid UTF-8"),
        (b'{"model":"a"}{"model":"b"}', "not valid JSON"),
        (b'{"model":"a"} trailing', "not valid JSON"),
        (b'{"model":"a","model":"b"}', "twice"),
        (b'{"model":"a","options":{"x":1,"x":2}}', "twice"),
        (b'{"model":"a","Model":"b"}', "'Model' must be written 'model'"),
        ('{"model":"a","\u017ftream":false}'.encode(), "must be written 'stream'"),
        ('{"model":"a","\u212aeep_alive":1}'.encode(), "must be written 'keep_alive'"),
        (b'{"model":"a","x":NaN}', "NaN"),
        (b'{"model":"a","x":Infinity}', "Infinity"),
        (b'{"model":"a","x":1e400}', "out of range"),
        (b'{"model":"a","x":99999999999999999999999999}', "out of range"),
        (b'{"model":"a","x":' + b"9" * 5000 + b"}", "out of range"),
        (b'{"model":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"model":"a",' + GOOD.encode() + b',"x":' + b"[" * 400 + b"]" * 400 + b"}", "nested too deeply"),
        (b'{"model":"a",' + GOOD.encode() + b',"x":"\\ud800"}', "Unicode"),
        (b'{"messages":[]}', "'model' is missing"),
        (b'{"model":""}', "'model' is missing"),
        (b'{"model":null}', "'model' is missing"),
        (b'{"model":5}', "'model' must be a string"),
        (b'{"model":"' + b"x" * 1000 + b'"}', "'model' must be a string"),
        (b'{"model":"a","messages":"hi"}', "'messages' must be a list"),
        (b'{"model":"a","messages":["hi"]}', "'messages' must be a list of objects"),
        (b'{"model":"a","stream":"true",' + GOOD.encode() + b"}", "'stream' must be true or false"),
    ],
)
@pytest.mark.parametrize("path", [OLLAMA_CHAT, OPENAI_CHAT])
def test_errors_name_what_is_wrong(gateway: RunningGateway, path: str, body: bytes, expected: str) -> None:
    with gateway.http(gateway.key()) as client:
        got = client.post(path, content=body)
    assert got.status_code == 400, got.text
    assert expected in message(got)
    assert got.headers["content-type"] == "application/json" and got.headers["x-request-id"]


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        (OLLAMA_CHAT, {"options": "x"}, "'options' must be an object"),
        (OLLAMA_CHAT, {"options": {"num_predict": "5"}}, "'num_predict' must be a number"),
        (OLLAMA_CHAT, {"options": {"num_predict": True}}, "'num_predict' must be a number"),
        (OLLAMA_CHAT, {"options": {"temperature": "hot"}}, "'temperature' must be a number"),
        (OLLAMA_CHAT, {"options": {"stop": 5}}, "'stop' must be a list"),
        (OLLAMA_CHAT, {"name": "b"}, "'model' and 'name' differ"),
        (OPENAI_CHAT, {"max_tokens": "5"}, "'max_tokens' must be a number"),
        (OPENAI_CHAT, {"n": 0}, "'n' must be an integer"),
        (OPENAI_CHAT, {"n": 1000}, "'n' must be an integer"),
        (OPENAI_CHAT, {"stream_options": 5}, "'stream_options' must be an object"),
        (OPENAI_CHAT, {"stream_options": {"Include_usage": True}}, "must be written 'include_usage'"),
        ("/v1/embeddings", {}, "'input' is missing"),
        ("/v1/completions", {}, "'prompt' is missing"),
        ("/v1/completions", {"prompt": 5}, "'prompt' must be a string or a list"),
        ("/api/embed", {"input": [1]}, "'input' must be"),
        ("/api/generate", {"prompt": []}, "'prompt' must be a string"),
    ],
)
def test_errors_name_wrong_types(gateway: RunningGateway, path: str, body: dict[str, object], expected: str) -> None:
    messages = {"messages": [{"role": "user", "content": "hi"}]} if path in (OLLAMA_CHAT, OPENAI_CHAT) else {}
    with gateway.http(gateway.key()) as client:
        got = client.post(path, json={"model": "a", **messages, **body})
    assert got.status_code == 400 and expected in message(got), got.text


def test_a_body_over_the_limit_is_refused_before_it_is_read(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key()) as client:
        for path in (OLLAMA_CHAT, OPENAI_CHAT):
            got = client.post(path, content=b"x" * 8_400_000)
            assert got.status_code == 413 and message(got).endswith(
                "larger than 8388608 bytes; MAX_REQUEST_BODY_BYTES sets that"
            )
            assert client.post(path, content=iter([b"x" * 60_000] * 140)).status_code == 413
    head = b"POST /api/chat HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Length: 9999999999\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.settimeout(5)
        connection.sendall(head % gateway.key().encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 413")


def test_bad_encodings_routes_methods_and_keys(gateway: RunningGateway) -> None:
    key = gateway.key()
    with gateway.http(key) as client:
        assert client.post(OLLAMA_CHAT, content=b"x", headers={"Content-Encoding": "br"}).status_code == 415
        assert client.post(OLLAMA_CHAT, content=b"{}", headers={"Content-Encoding": "gzip"}).status_code == 400
        assert client.get("/api/nothing").json() == {"error": "There is no such route here."}
        assert client.get("/v1/nothing").json()["error"]["code"] == "not_found"
        wrong = client.put(OPENAI_CHAT)
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
        assert client.get("//api/tags").status_code == 404
        assert client.get("/v1/models", headers={"x-api-key": key_format.mint().whole}).status_code == 400
    with gateway.http() as client:
        assert client.get("/api/tags").status_code == 401
        assert client.get("/api/tags", headers={"Authorization": "Bearer"}).status_code == 401
        assert client.get("/api/tags", headers={"Authorization": "Bearer nonsense"}).status_code == 401
        assert client.get("/").text == "Ollama is running" and client.head("/").status_code == 200
        assert client.get(f"/k/{key}/").status_code == 200 and client.get(f"/k/{key}/api/tags").status_code == 200
        preflight = client.options(OPENAI_CHAT, headers={"Origin": "http://a", "Access-Control-Request-Method": "POST"})
        assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/api/pull"), ("POST", "/api%2Fpull"), ("POST", "/api/%70ull"), ("DELETE", "/api/delete"), ("POST", "/api/me")],
)
def test_admin_routes_are_refused_in_every_spelling(
    gateway: RunningGateway, alpha: FakeBackend, method: str, path: str
) -> None:
    with gateway.http(gateway.key()) as client:
        assert client.request(method, path, content=b'{"model":"a"}').status_code == 403
    assert not alpha.calls("/api/pull")


@pytest.mark.parametrize(
    "line", [b"POST http://evil.example/api/pull HTTP/1.1", b"POST //api/pull HTTP/1.1", b"POST /api/./pull HTTP/1.1"]
)
def test_odd_request_targets_reach_no_backend(gateway: RunningGateway, alpha: FakeBackend, line: bytes) -> None:
    request = line + b"\r\nHost: a\r\nAuthorization: Bearer %s\r\nContent-Length: 2\r\n\r\n{}" % gateway.key().encode()
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.settimeout(5)
        connection.sendall(request)
        assert connection.recv(65536).split()[1] in (b"400", b"403", b"404")
    assert not alpha.calls("/api/pull")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted(Ollama.known_fields | OpenAI.known_fields))
BODIES = st.dictionaries(FIELDS, JSON, max_size=6).map(lambda body: json.dumps({"model": "a", **body}).encode())


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(raw=st.binary(max_size=200) | st.text(max_size=200).map(str.encode) | BODIES)
def test_parsers_raise_only_errors_of_the_gateway(raw: bytes) -> None:
    for dialect in (Ollama(), OpenAI()):
        for operation in dialect.operations:
            try:
                call = read_call(dialect, operation, raw)
                for kind in operation.kinds:
                    json.loads(call.body_for(kind, "a:latest", 100))
            except GatewayError as error:
                assert 400 <= error.status < 500


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    body=BODIES | st.binary(max_size=100), path=st.sampled_from([o.path for d in (Ollama(), OpenAI()) for o in d.operations])
)
def test_no_client_input_causes_a_500(gateway: RunningGateway, body: bytes, path: str) -> None:
    key = getattr(gateway, "fuzz_key", None) or gateway.key()
    gateway.fuzz_key = key  # type: ignore[attr-defined]
    with gateway.http(key) as client:
        assert client.post(path, content=body).status_code != 500


ANSWERS = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
TYPES = st.sampled_from(["application/json", "text/event-stream", "application/x-ndjson", "text/html", ""])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=ANSWERS | st.lists(ANSWERS, max_size=3).map(lambda parts: b"".join(b"data: " + part + b"\n\n" for part in parts)),
    status=st.sampled_from([200, 200, 200, 204, 301, 400, 401, 404, 422, 429, 500, 503, 599]),
    content_type=TYPES,
    path=st.sampled_from([OLLAMA_CHAT, OPENAI_CHAT]),
    stream=st.booleans(),
)
def test_no_backend_answer_causes_a_500(
    gateway: RunningGateway, alpha: FakeBackend, content: bytes, status: int, content_type: str, path: str, stream: bool
) -> None:
    key = getattr(gateway, "fuzz_key", None) or gateway.key()
    gateway.fuzz_key = key  # type: ignore[attr-defined]
    alpha.play(path, answer(status, content, content_type))
    with gateway.http(key) as client:
        got = client.post(path, json={"model": "a", "stream": stream, "messages": [{"role": "user", "content": "hi"}]})
    assert got.status_code != 500
    if got.status_code != 200:
        assert message(got)


def nested(depth: int) -> str:
    return "[" * depth + '"x"' + "]" * depth


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/embeddings", '{"model":"a","input":' + nested(900) + "}"),
        ("/v1/completions", '{"model":"a","prompt":' + nested(600) + "}"),
        (OPENAI_CHAT, '{"model":"a",' + GOOD + ',"tools":[{"type":"x","y":"\\ud800"}]}'),
        (
            OPENAI_CHAT,
            '{"model":"a","messages":[{"role":"user","content":"hi","tool_calls":[{"function":{"a":' + nested(300) + "}}]}]}",
        ),
        (OLLAMA_CHAT, '{"model":"a","messages":[{"role":"user","content":"hi","tool_calls":[{"function":{"a":"\\udfff"}}]}]}'),
    ],
    ids=["deep input", "deep prompt", "half a letter in tools", "deep calls", "half a letter in calls"],
)
def test_bodies_that_cannot_be_counted_are_refused(gateway: RunningGateway, route: str, body: str) -> None:
    with gateway.http(gateway.key(tpm=10_000)) as client:
        got = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert got.status_code == 400 and "the body" in message(got)


SUGGESTIONS = {
    "/v1": "/v1/models",
    "/v1/": "/v1/models",
    "//v1/models": "/v1/models",
    "/v1//models": "/v1/models",
    "/v1/models/": "/v1/models",
    "/v1/v1/models": "/v1/models",
    "/api/v1/models": "/v1/models",
    "/openai/v1/chat/completions": "/v1/chat/completions",
    "/V1/Chat/Completions": "/v1/chat/completions",
    "/v1/chat": "/v1/chat/completions",
    "/v1/chat/completion": "/v1/chat/completions",
    "/chat/completions": "/v1/chat/completions",
    "/models": "/v1/models",
    "/v1/v1/models/llama3.2": "/v1/models/{id}",
    "/api": "/api/tags",
    "/api/tags/": "/api/tags",
    "/v1/api/tags": "/api/tags",
    "/tags": "/api/tags",
    "/api/api/chat": "/api/chat",
    "/embeddings": "/v1/embeddings",
    "/responses": "/v1/responses",
    "/messages": "/v1/messages",
    "/v1/v1/messages": "/v1/messages",
}


def test_mistyped_paths_get_a_suggestion(gateway: RunningGateway) -> None:
    with gateway.http() as client:
        for typed, meant in SUGGESTIONS.items():
            for got in (client.get(f"{gateway.url}{typed}"), client.get(f"{gateway.url}/k/nz_any{typed}")):
                assert (got.status_code, message(got)) == (404, f"There is no such route here; did you mean {meant}?"), typed
                # In the dialect of the suggested route: with /v1 missing or doubled it is still an OpenAI client.
                assert isinstance(got.json()["error"], dict) == meant.startswith("/v1"), typed
                assert ("request_id" in got.json()) == meant.startswith("/v1/messages"), typed
        for typed in (
            "/favicon.ico",
            "/admin",
            "/admin/v1/key",
            "/v1/m",
            "/metrics",
            "/dashboard",
            "/" + "v1/" * 60,
        ):
            assert message(client.get(f"{gateway.url}{typed}")) == "There is no such route here.", typed
        for typed in ("/images/generations", "/audio/speech", "/openai/files", "/api/v1/batches", "//v1/files"):
            assert client.post(f"{gateway.url}{typed}").json()["error"]["code"] == "not_found", typed
        lines = {line["route"]: line["dialect"] for line in gateway.request_lines()[-5:]}
        assert set(lines.values()) == {"openai"}


def test_an_openai_client_without_v1_gets_a_suggestion(gateway: RunningGateway) -> None:
    with (
        openai.OpenAI(base_url=gateway.url, api_key="any", max_retries=0) as client,
        pytest.raises(openai.NotFoundError) as raised,
    ):
        client.chat.completions.create(model="llama3.2", messages=[{"role": "user", "content": "Hi"}])
    assert raised.value.code == "not_found" and "did you mean /v1/chat/completions?" in str(raised.value)
