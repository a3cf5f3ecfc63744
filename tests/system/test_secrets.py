"""Canary secrets: client keys never go upstream, backend tokens never come down, neither is in any log or error."""

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


def test_tokens_open_the_backends_and_appear_nowhere(
    start_gateway: StartGateway, backends: list[FakeBackend], stores: TestStores
) -> None:
    gateway = start(start_gateway, backends)
    key = gateway.key()
    came_down: list[str] = []
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
                    came_down.append(got.text.replace(PROMPT, "") + str(got.headers))
            backend.play(path, answer(400, {"error": {"message": f"bad token {TOKEN} at {backend.url}, Bearer {TOKEN}"}}))
            came_down.append(client.post(path, json=body).text)
        came_down.append(client.get("/readyz").text + client.get("/api/tags").text + client.get("/v1/models").text)
    assert TOKEN not in "".join(came_down) and all(backend.url not in "".join(came_down) for backend in backends)
    logged = all_logged(gateway)
    assert TOKEN not in logged and key not in logged and PROMPT not in logged
    assert "request_id" in logged
    during = dump_redis(stores)
    gateway.audit_rows()
    kept = during + dump_redis(stores) + dump_postgres(stores)
    assert TOKEN not in kept and key not in kept and key.rpartition("_")[2] not in kept and PROMPT not in kept
    assert "/v1/chat/completions" in kept


@pytest.mark.parametrize("together", [False, True], ids=["frame by frame", "in one piece"])
@pytest.mark.parametrize("path", ["/api/chat", "/v1/chat/completions"])
def test_an_error_within_a_stream_tells_no_secret(
    start_gateway: StartGateway, backends: list[FakeBackend], path: str, together: bool
) -> None:
    gateway, backend = start(start_gateway, backends), backends[0]
    place = backend.url.removeprefix("http://")
    words = f'{TOKEN.upper()} of "{backend.url}/v1" for dial tcp {place}: bearer x-y-z'
    frames: list[bytes]
    if path == "/api/chat":
        says = {"model": "a", "message": {"role": "assistant", "content": "error: Bearer of news"}, "done": False}
        frames = ndjson([says, {**says, "error": None}, {"error": words}])
        steps = stream([b"".join(frames)] if together else frames, NDJSON)
    else:
        says = {"id": "1", "choices": [{"index": 0, "delta": {"content": "error"}}]}
        in_lines = b'data: {\r\ndata: "error":\r\ndata: {"message": %b}}\r\n\r\n' % json.dumps(words).encode()
        frames = [*sse([says, {"error": {"message": words, "code": 500}}], done=False), in_lines]
        steps = stream([b"".join(frames)] if together else frames)
    backend.play(path, steps)
    with gateway.http(gateway.key()) as client:
        got = client.post(path, json={"model": "a", "messages": [], "stream": True})
    assert got.content.startswith(frames[0]), "what is no error comes as it came"
    assert TOKEN not in got.text.lower() and place not in got.text and "x-y-z" not in got.text
    told = '*** of "***/v1" for dial tcp ***: Bearer ***'
    assert got.text.count(json.dumps(told)) == (1 if path == "/api/chat" else 2)
    assert got.text.count("\r\n") == (0 if path == "/api/chat" else 4), "the framing stays"


def test_a_key_goes_to_no_backend_and_into_no_log(start_gateway: StartGateway, backends: list[FakeBackend]) -> None:
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
    sent_up = "".join(str(request.headers) + request.target + str(request.body) for b in backends for request in b.requests)
    assert secret not in sent_up and "origin" not in sent_up.lower() and "forwarded" not in sent_up.lower()
    assert secret not in all_logged(gateway)


def test_a_wrong_token_is_told_to_the_operator_alone(start_gateway: StartGateway, backends: list[FakeBackend]) -> None:
    gateway = start_gateway(entry_of(backends[0], auth_token="stale-token-of-before"))
    assert gateway.components.discovery.catalog.snapshots[0].error.startswith("token_refused")
    with gateway.http(gateway.key()) as client:
        assert client.post("/api/chat", json={"model": "a", "messages": []}).status_code == 403
    assert "token_refused" in all_logged(gateway)


def test_the_request_line_has_what_an_operator_needs(start_gateway: StartGateway, backends: list[FakeBackend]) -> None:
    gateway = start(start_gateway, backends)
    with gateway.http(gateway.key()) as client:
        client.post("/api/chat", json={"model": "a", "messages": []}, headers={"X-Request-ID": "mine-1"})
        client.get("/api/tags", headers={"X-Request-ID": 'not "well" formed'})
    first, second = gateway.request_lines()
    assert first["request_id"] == "mine-1" and first["backend"] == "alpha" and first["outcome"] == "answered"
    assert first["client"] == "127.0.0.1" and first["route"] == "/api/chat" and first["total_ms"] >= first["ttfb_ms"] > 0
    assert second["request_id"] != 'not "well" formed' and len(second["request_id"]) == 32
    assert json.loads(JsonLines().format(gateway.logged.records[-1]))


def test_the_load_generator_gets_its_key_where_ps_does_not_show_it(tmp_path: Path) -> None:
    script = tmp_path / "loadgen"
    script.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(dict(said=sys.argv, read=sys.stdin.read())))\n")
    script.chmod(0o700)
    key = key_format.mint().whole
    told = tools.load(tools.Tools("", str(script)), 1, key, [])
    assert key not in " ".join(told["said"]) and told["read"] == f"{key}\n"
