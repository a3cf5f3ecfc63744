"""Client keys never reach a backend, backend tokens never reach a client, and neither is in a log, an error or a store."""

import json
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.auth import key_format
from gateway.telemetry.logs import ConsoleLines, JsonLines
from tests.bench import tools
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import FAULTS, NDJSON, answer, ndjson, sse, stream
from tests.support.gateway_settings import entry_of
from tests.support.running_gateway import RunningGateway
from tests.support.store_dump import dump_postgres, dump_redis

TOKEN = "canary-backend-token-4f7a1c"
PROMPT = "canary prompt text"


@pytest.fixture
def backends() -> Iterator[list[FakeBackend]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(FakeBackend(models=["a:latest"], name="alpha", token=TOKEN)),
            stack.enter_context(FakeBackend("openai", ["b"], name="beta", token=TOKEN)),
            stack.enter_context(FakeBackend(models=["c:latest"], name="gamma", token=TOKEN, token_header="X-Api-Key")),
        ]


def start(start_gateway: StartGateway, backends: list[FakeBackend]) -> RunningGateway:
    headers = [{}, {}, {"auth_header": "X-Api-Key"}]
    entries = [entry_of(backend, auth_token=TOKEN, **more) for backend, more in zip(backends, headers, strict=True)]
    return start_gateway(*entries)


def all_logged(gateway: RunningGateway) -> str:
    formatters: list[logging.Formatter] = [JsonLines(), ConsoleLines()]
    ours = [record for record in gateway.logged.records if not record.name.startswith(("httpx", "httpcore", "openai"))]
    return "\n".join(formatter.format(record) for record in ours for formatter in formatters)


def test_backend_tokens_are_sent_to_the_backends_and_appear_nowhere_else(
    start_gateway: StartGateway, backends: list[FakeBackend], stores: TestStores
) -> None:
    gateway = start(start_gateway, backends)
    key = gateway.key()
    responses: list[str] = []
    with gateway.http(key) as client:
        for model, backend in zip("abc", backends, strict=True):
            path = "/v1/chat/completions"
            body = {"model": model, "messages": [{"role": "user", "content": PROMPT}]}
            got = client.post(path, json=body)
            assert got.status_code == 200 and backend.healthy.name in got.text
            for stream in (True, False):
                for fault in FAULTS.values():
                    backend.play(path, fault("openai", stream) if fault is not FAULTS["head_timeout"] else answer(500, b""))
                    got = client.post(path, json={**body, "stream": stream})
                    responses.append(got.text.replace(PROMPT, "") + str(got.headers))
            backend.play(path, answer(400, {"error": {"message": f"bad token {TOKEN} at {backend.url}, Bearer {TOKEN}"}}))
            responses.append(client.post(path, json=body).text)
        responses.append(client.get("/readyz").text + client.get("/api/tags").text + client.get("/v1/models").text)
    assert TOKEN not in "".join(responses) and all(backend.url not in "".join(responses) for backend in backends)
    logged = all_logged(gateway)
    assert TOKEN not in logged and key not in logged and PROMPT not in logged
    assert "request_id" in logged
    during = dump_redis(stores)
    gateway.audit_rows()
    stored = during + dump_redis(stores) + dump_postgres(stores)
    assert TOKEN not in stored and key not in stored and key.rpartition("_")[2] not in stored and PROMPT not in stored
    assert "/v1/chat/completions" in stored


@pytest.mark.parametrize("in_one_piece", [False, True], ids=["frame by frame", "in one piece"])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_an_error_in_a_stream_holds_no_secret(
    start_gateway: StartGateway, backends: list[FakeBackend], path: str, in_one_piece: bool
) -> None:
    gateway, backend = start(start_gateway, backends), backends[0]
    place = backend.url.removeprefix("http://")
    message = f'{TOKEN.upper()} of "{backend.url}/v1" for dial tcp {place}: bearer x-y-z'
    frames: list[bytes]
    if path == "/api/chat":
        chunk = {"model": "a", "message": {"role": "assistant", "content": "error: Bearer of news"}, "done": False}
        frames = ndjson([chunk, {**chunk, "error": None}, {"error": message}])
        steps = stream([b"".join(frames)] if in_one_piece else frames, NDJSON)
    else:
        chunk = {"id": "1", "choices": [{"index": 0, "delta": {"content": "error"}}]}
        multiline = b'data: {\r\ndata: "error":\r\ndata: {"message": %b}}\r\n\r\n' % json.dumps(message).encode()
        frames = [*sse([chunk, {"error": {"message": message, "code": 500}}], done=False), multiline]
        steps = stream([b"".join(frames)] if in_one_piece else frames)
    backend.play(path, steps)
    with gateway.http(gateway.key()) as client:
        got = client.post(path, json={"model": "a", "messages": [], "stream": True})
    assert got.content.startswith(frames[0]), "what is no error passes unchanged"
    assert TOKEN not in got.text.lower() and place not in got.text and "x-y-z" not in got.text
    redacted = '*** of "***/v1" for dial tcp ***: Bearer ***'
    assert got.text.count(json.dumps(redacted)) == (1 if path == "/api/chat" else 2)
    assert got.text.count("\r\n") == (0 if path == "/api/chat" else 4), "the framing is kept"


def test_a_key_reaches_no_backend_and_no_log(start_gateway: StartGateway, backends: list[FakeBackend]) -> None:
    gateway = start(start_gateway, backends)
    key, body = gateway.key(), {"model": "a", "stream": False, "messages": []}
    secret = key.rpartition("_")[2]
    with gateway.http() as client:
        cookies = {"Cookie": f"session={secret}", "Origin": "http://localhost", "Forwarded": f"for={secret}"}
        for headers in ({"Authorization": f"Bearer {key}"}, {"x-api-key": key}, {"api-key": key}):
            assert client.post("/api/chat", json=body, headers={**headers, **cookies}).status_code == 200
        assert client.post("/api/chat", json=body, auth=("anybody", key)).status_code == 200
        assert client.post(f"/k/{key}/api/chat", json=body).status_code == 200
        client.post(f"/k/{key}/api/nothing", json=body)
        client.post(f"/k/{key}x/api/chat", json=body)
    raw = b"GET /k/%s/\x01 HTTP/1.1\r\n\r\n" % key.encode()
    with socket.create_connection(("127.0.0.1", int(gateway.url.rpartition(":")[2]))) as connection:
        connection.sendall(raw)
        connection.recv(1000)
    upstream = "".join(str(request.headers) + request.target + str(request.body) for b in backends for request in b.requests)
    assert secret not in upstream and "origin" not in upstream.lower() and "forwarded" not in upstream.lower()
    assert secret not in all_logged(gateway)


def test_only_the_operator_learns_of_a_wrong_backend_token(start_gateway: StartGateway, backends: list[FakeBackend]) -> None:
    gateway = start_gateway(entry_of(backends[0], auth_token="outdated-token"))
    assert gateway.components.discovery.catalog.snapshots[0].error.startswith("token_refused")
    with gateway.http(gateway.key()) as client:
        assert client.post("/api/chat", json={"model": "a", "messages": []}).status_code == 403
    assert "token_refused" in all_logged(gateway)


def test_the_log_line_of_a_request_has_what_an_operator_needs(start_gateway: StartGateway, backends: list[FakeBackend]) -> None:
    gateway = start(start_gateway, backends)
    with gateway.http(gateway.key()) as client:
        client.post("/api/chat", json={"model": "a", "messages": []}, headers={"X-Request-ID": "mine-1"})
        client.get("/api/tags", headers={"X-Request-ID": 'not "well" formed'})
    first, second = gateway.request_lines()
    assert first["request_id"] == "mine-1" and first["backend"] == "alpha" and first["outcome"] == "answered"
    assert first["client"] == "127.0.0.1" and first["route"] == "/api/chat" and first["total_ms"] >= first["ttfb_ms"] > 0
    assert second["request_id"] != 'not "well" formed' and len(second["request_id"]) == 32
    assert json.loads(JsonLines().format(gateway.logged.records[-1]))


def test_the_load_generator_gets_its_key_on_standard_input(tmp_path: Path) -> None:
    script = tmp_path / "loadgen"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(dict(arguments=sys.argv, read=sys.stdin.read())))\n"
    )
    script.chmod(0o700)
    key = key_format.mint().whole
    seen = tools.load(tools.Tools("", str(script)), 1, key, [])
    assert key not in " ".join(seen["arguments"]) and seen["read"] == f"{key}\n"
