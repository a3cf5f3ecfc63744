"""The terminal's view: it fits, shows what is in trouble first, and asks the admin API like anybody."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gateway.auth.key import ADMIN
from gateway.core.errors import CommandFailed
from gateway.ops.cli import top
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import environment_for
from tests.support.processes import operate, until

MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}


QUEUE = {"model": "q" * 40, "calls": 40, "tokens": 10**9, "oldest_s": 12.3, "first_s": None, "last_s": 7300.0}
PLACE = {"model": "llama3.1:8b", "is_loaded": True, "vram": 5 * 10**9, "left_s": 130.0, "slots": 4, "in_use": 3}
PLACE |= {"prefill_tps": 2345.6, "decode_tps": None}


def backend(number: int, **more: Any) -> dict[str, Any]:
    facts = {"name": f"backend-{number}", "state": "up", "breaker": "closed", "open_for_s": 0.0, "in_flight": 3}
    seen = {"max_connections": 64, "latency_ms": 12.0, "models": 7, "error": "", "drained": None}
    memory = {"used": 12 * 10**9, "seen": 24 * 10**9}
    return {**facts, **seen, "memory": memory, "loading": None, "places": [PLACE] * (number % 3), **more}


def seen(backends: list[dict[str, Any]], busy: int) -> dict[str, Any]:
    key = {"key": "a key with a long name", "key_id": "x", "requests": 120, "limited": 9, "limit": "rpm"}
    model = {"model": "a-model-with-a-long-name:latest", "requests": 999999, "ttfb_p50_ms": 12345.0}
    sums = {"requests": 1200, "failures": 1, "refused": 9, "prompt_tokens": 10**9, "completion_tokens": 10**9}
    lately = {**sums, "ttfb_p50_ms": 3.0, "ttfb_p99_ms": None, "keys": [key] * busy, "models": [model] * busy}
    stores = {"redis": True, "postgresql": False}
    now = {"at": "2026-01-31T12:00:00+00:00", "processes": 4, "in_flight": 12, "waiting": 0, "audit_backlog": None}
    now |= {"waiting_for_backends": 40 * busy, "queues": [QUEUE] * busy}
    return {**now, "stores": stores, "backends": backends, "lately": lately}


@pytest.mark.parametrize(("backends", "busy"), [(0, 0), (1, 1), (3, 10), (50, 10)])
@pytest.mark.parametrize("size", [(80, 24), (200, 60), (80, 10)])
def test_the_screen_fits_the_terminal(backends: int, busy: int, size: tuple[int, int]) -> None:
    facts = seen([backend(number) for number in range(backends)], busy)
    facts["lately"]["cached_tokens"] = 10**9
    lines = top.frame(facts, *size)
    assert len(lines) <= size[1] and max(map(len, lines)) <= size[0]
    assert all(line.isprintable() for line in lines)


def test_backends_with_problems_are_shown_first() -> None:
    troubled: dict[int, dict[str, Any]] = {
        40: {"state": "away", "error": "unreachable"},
        41: {"breaker": "open", "open_for_s": 4.0},
        42: {"drained": {"by": "ops"}},
    }
    text = "\n".join(top.frame(seen([backend(number, **troubled.get(number, {})) for number in range(50)], 10), 80, 24))
    assert "backend-40" in text and "unreachable" in text and "open 4s" in text and "drained" in text
    assert "1000000000 out)" in text and "cached" not in text, "a gateway of before does not tell them"
    assert "more, all fine" in text and "AT rpm (9)" in text and "postgresql DOWN" in text


def test_memory_slots_and_queues_are_shown() -> None:
    loading = {"model": "qwen3:32b", "for_s": 3.0, "left_s": 4.0}
    always = {**PLACE, "model": "vllm", "vram": 0, "left_s": None, "in_use": None}
    backends = [backend(1, loading=loading), backend(0, memory=None, places=[always])]
    text = "\n".join(top.frame(seen(backends, 2), 120, 30))
    assert "waiting for a backend 80, for a key 0" in text
    assert "backend-1      up      closed    3/4    12.0/24.0  12ms    loading qwen3:32b, llama3.1:8b\n" in text
    assert "backend-0      up      closed    0/4    -          12ms    vllm\n" in text
    assert f"{'q' * 28} 40      100000000 12.3s    -        2.0h\n" in text
    assert "llama3.1:8b                backend-1      3/4     5.0      2m       2346     -\n" in text
    assert "vllm                       backend-0      ?/4     -        always   2346     -\n" in text
    without_redis = "\n".join(top.frame(seen(backends, 0) | {"waiting_for_backends": None, "queues": None}, 80, 24))
    assert "waiting for a backend ?" in without_redis and "WAITING FOR" not in without_redis


def test_a_read_only_postgresql_is_shown() -> None:
    for takes_writes, state in ((True, "postgresql up"), (False, "postgresql READ-ONLY")):
        now = seen([], 0) | {"stores": {"redis": True, "postgresql": True}, "postgresql_takes_writes": takes_writes}
        assert state in "\n".join(top.frame(now, 80, 24))


def test_the_screen_without_postgresql_and_with_odd_names() -> None:
    odd = seen([backend(0, name="\x1b[31mred\x07")], 0) | {"lately": None}
    lines = top.frame(odd, 80, 24)
    assert "unknown while PostgreSQL is unreachable" in "\n".join(lines) and all(line.isprintable() for line in lines)


def test_top_shows_a_running_gateway(
    start_gateway: StartGateway, alpha: FakeBackend, stores: TestStores, tmp_path: Path
) -> None:
    gateway = start_gateway(alpha)
    admin = gateway.key(name="ops", flags=(ADMIN,))
    with gateway.http(gateway.key(name="alice")) as client:
        client.post("/api/chat", json=CHAT)
    until(lambda: top.overview(gateway.url, admin)["lately"]["requests"] >= 1, 15)
    names = environment_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, ADMIN_KEY=admin)
    shown = operate(tmp_path, names, "top", "--url", gateway.url)
    assert "alpha" in shown and "alice" in shown and MODEL in shown
    with pytest.raises(CommandFailed, match="answers 403: this needs a key with the role admin"):
        top.overview(gateway.url, gateway.key())
    with pytest.raises(CommandFailed, match=r"no gateway answers at http://127\.0\.0\.1:1: "):
        top.overview("http://127.0.0.1:1", admin)


class Odd(BaseHTTPRequestHandler):
    """What stands where no gateway does."""

    status, body = 200, b"{}"
    keys: tuple[tuple[str, str | None], ...] = ()

    def do_GET(self) -> None:
        type(self).keys = (*self.keys, (self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        if self.status == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"{}"), (200, b"[]"), (200, b"3"), (200, b"<html>"), (302, b""), (500, b'{"error": "\\u001b[31mred"}')],
)
def test_a_server_that_is_not_a_gateway_is_reported_and_gets_the_key_once(status: int, body: bytes) -> None:
    class Answering(Odd):
        pass

    Answering.status, Answering.body = status, body
    with HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(CommandFailed) as failed:
                top.overview(f"http://127.0.0.1:{server.server_port}", "nz_key")
        finally:
            server.shutdown()
            thread.join(5)
    assert str(failed.value).isprintable()
    assert Answering.keys == (("/admin/v1/overview", "Bearer nz_key"),)


def test_a_key_with_characters_that_no_header_can_carry_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CommandFailed) as failed:
        top.overview("http://127.0.0.1:1", "nz_secret\nword")
    assert "secret" not in str(failed.value)
