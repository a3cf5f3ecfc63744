"""The seconds of backends: as they report them, else for how long slots were held; in rows, sums and metrics alike."""

import random
import time
from typing import Any

import httpx
import pytest

from gateway.audit import abandoned, backend_seconds, reports
from gateway.audit.record import Record
from gateway.dialects.dialect import Usage
from gateway.fleet.attempt import Attempt
from gateway.limits.quota import CounterSet
from tests.conftest import StartGateway
from tests.support.audit_rows import ago
from tests.support.chat_requests import MODEL
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.content import Json
from tests.support.fake_backend.scripts import FAULTS
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway
from tests.telemetry.test_metrics import TOKEN, scraped, total

MESSAGES = [{"role": "user", "content": "Say hi"}]
CHAT = {"model": MODEL, "messages": MESSAGES, "stream": False}
GENERATE = {"model": MODEL, "prompt": "Say hi"}
LARGE = {"model": "large", "messages": MESSAGES}


class Reports:
    """Durations by chance, of which every third has a load; `sum_s` is what was reported."""

    def __init__(self, parts: int) -> None:
        self._random, self._parts = random.Random(4), parts
        self.sum_s, self.loads = 0.0, 0

    def __call__(self, fields: Json) -> tuple[float, float, float]:
        has_load = self._random.random() < 1 / 3
        self.loads += has_load
        found = (self._random.uniform(1, 20) if has_load else 0.01, self._random.uniform(0, 3), self._random.uniform(0, 9))
        self.sum_s += sum(found[3 - self._parts :])
        return found


def test_sums_are_what_the_backends_reported(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    """Streamed and whole, passed through to Ollama and translated for llama.cpp."""
    with FakeBackend(kind="openai", models=["large"], name="cpp") as cpp:
        of_ollama, of_llama_cpp = alpha.healthy.durations, cpp.healthy.durations = Reports(3), Reports(2)
        gateway = start_gateway(alpha, cpp, METRICS_TOKEN=TOKEN)
        with gateway.http(gateway.key()) as client:
            for stream in (True, False) * 4:
                for path, body in (("/api/chat", CHAT), ("/api/generate", GENERATE), ("/api/chat", LARGE)):
                    assert client.post(path, json={**body, "stream": stream}).status_code == 200
        rows = gateway.audit_rows()
        reported_s = of_ollama.sum_s + of_llama_cpp.sum_s
        assert {(row["seconds_from"], row["stream"]) for row in rows} == {("reported", True), ("reported", False)}
        assert {row["translated_to"] for row in rows} == {None, "/v1/chat/completions"}
        assert sum(row["backend_ms"] for row in rows) / 1000 == pytest.approx(reported_s, rel=1e-4)
        assert sum(row["loaded"] for row in rows) == of_ollama.loads > 0
        by_backend = {row["backend"]: row for row in gateway.call(usage(gateway, "backend"))}
        assert by_backend["alpha"]["backend_s"] == pytest.approx(of_ollama.sum_s, rel=1e-4)
        assert by_backend["cpp"]["backend_s"] == pytest.approx(of_llama_cpp.sum_s, rel=1e-4)
        assert by_backend["alpha"]["loads"] == of_ollama.loads and by_backend["alpha"]["load_s"] > of_ollama.loads
        samples = scraped(gateway.url)
        assert total(samples, "gateway_backend_seconds_total", backend="alpha") == pytest.approx(of_ollama.sum_s, rel=1e-4)
        parts = {dict(labels)["part"] for name, labels in samples if name == "gateway_backend_seconds_total"}
        assert parts == {"load", "prefill", "decode"}


async def usage(gateway: RunningGateway, *by: str) -> list[dict[str, Any]]:
    return await reports.usage(gateway.components.database, by, ago(1))


@pytest.mark.parametrize("stream", [True, False])
def test_without_a_report_the_time_of_the_slot_counts(start_gateway: StartGateway, alpha: FakeBackend, *, stream: bool) -> None:
    alpha.healthy.pause_s = 0.05
    gateway = start_gateway(alpha, METRICS_TOKEN=TOKEN)
    with gateway.http(gateway.key()) as client:
        began = time.monotonic()
        assert client.post("/v1/chat/completions", json={**CHAT, "stream": stream}).status_code == 200
        took_ms = (time.monotonic() - began) * 1000
    (row,) = gateway.audit_rows()
    assert (row["seconds_from"], row["load_ms"], row["loaded"]) == ("slot", None, False)
    assert 150 < row["backend_ms"] < took_ms
    assert total(scraped(gateway.url), "gateway_backend_seconds_total", part="slot") == pytest.approx(
        row["backend_ms"] / 1000, abs=1e-5
    )


def test_failed_attempts_count_and_are_counted_where_they_were(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    alpha.play("/api/chat", FAULTS["500"]("ollama", False))
    beta.healthy.durations = lambda _: (0, 1, 2)
    gateway = start_gateway(alpha, beta, METRICS_TOKEN=TOKEN)
    with gateway.http(gateway.key()) as client:
        assert client.post("/api/chat", json=CHAT).status_code == 200
        beta.stop()
        assert client.post("/api/chat", json=CHAT).status_code >= 500
    answered, failed = gateway.audit_rows()
    assert answered["seconds_from"] == "reported" and 3000 < answered["backend_ms"] < 3500
    # The second backend was never reached.
    assert failed["seconds_from"] == "slot" and 0 < failed["backend_ms"] < 500
    samples = scraped(gateway.url)
    of_alpha = total(samples, "gateway_backend_seconds_total", backend="alpha", part="slot")
    assert of_alpha == pytest.approx((answered["backend_ms"] - 3000 + failed["backend_ms"]) / 1000, abs=1e-3)
    assert total(samples, "gateway_backend_seconds_total", backend="beta") == pytest.approx(3)


def test_a_client_that_leaves_is_charged_for_the_time_of_its_slot(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    alpha.healthy.pause_s = 0.3
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client, pytest.raises(httpx.ReadTimeout):
        client.post("/api/chat", json=CHAT, timeout=0.2)
    until(lambda: len(gateway.request_lines()) == 1)
    (row,) = gateway.audit_rows()
    assert (row["outcome"], row["seconds_from"]) == ("client_gone", "slot") and 100 < row["backend_ms"] < 1000


def test_what_no_backend_worked_on_has_no_seconds(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        client.get("/api/tags")
        client.post("/api/chat", json={**CHAT, "model": "unknown"})
        alpha.stop()
        client.post("/api/chat", json=CHAT)
    assert {(row["seconds_from"], row["backend_ms"]) for row in gateway.audit_rows()} == {("none", None)}


def test_an_abandoned_call_has_no_seconds() -> None:
    info = abandoned.call_info([CounterSet("k1", -1, 100, -1, -1, -1)], MODEL, 21, Record("i", "i", "POST").opening_fields())
    assert b'"backend_ms":null' in abandoned.settlement_of("x", b"25 " + info).row


@pytest.mark.parametrize(
    ("known", "load_s", "loaded"),
    [(None, None, False), (None, 0.04, False), (None, 2.0, True), (True, None, True), (False, 9.0, False)],
)
def test_a_load_is_named(known: bool | None, load_s: float | None, loaded: bool) -> None:
    """By whoever knows it, else by the backend's report: a few milliseconds are no load."""
    record = Record("i", "i", "POST", loaded=known, usage=Usage(load_s=load_s))
    assert backend_seconds.has_loaded(record) is loaded


def test_attempts_that_were_not_sent_occupy_nothing() -> None:
    faults = ("unreachable", "connect_timeout", "full", "disconnected", "first_byte_timeout", "busy", "cannot")
    assert [Attempt("alpha", fault, 1500).occupied_s for fault in faults] == [0, 0, 0, 1.5, 1.5, 1.5, 1.5]
