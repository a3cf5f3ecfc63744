"""The metrics: correct across workers, bounded, and only for allowed callers."""

import asyncio
import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from gateway.telemetry.metrics import Metrics
from tests.conftest import StartGateway, TestStores
from tests.support.audit_rows import sql
from tests.support.documents import page, section, tables
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.gateway_settings import entry_of, environment_for
from tests.support.processes import descendants, operate, serving, until
from tests.support.project import PROJECT
from tests.support.running_gateway import RunningGateway

TOKEN = "nobody-guesses-this"
MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}
OPS = PROJECT / "docs" / "monitoring"
PAGE = "docs/reference/metrics.md"
NAME = re.compile(r"gateway_[a-z_]+")
# What only grows.
GROWING = ("_total", "_count", "_bucket", "_sum")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for (found, have), value in samples.items() if found == name and wanted <= set(have))


def scraped(url: str) -> Samples:
    answer = httpx.get(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    return read(answer.text)


def fresh(gateway: RunningGateway) -> Samples:
    """The metrics after all requests have ended and have been sampled."""
    gateway.wait_idle()
    time.sleep(1.2)
    return scraped(gateway.url)


def test_the_outcomes_of_requests_are_counted(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    gateway = start_gateway(alpha, beta, METRICS_TOKEN=TOKEN)
    key, tight = gateway.key(), gateway.key(rpm=1)
    alpha.healthy.cached = lambda _: 1
    alpha.play_once("/api/chat", answer(500, {"error": "no"}))
    with gateway.http(key) as client, gateway.http(tight) as limited, gateway.http("nz_wrong") as stranger:
        for _ in range(3):
            assert client.post("/api/chat", json=CHAT).status_code == 200
        assert client.post("/v1/chat/completions", json={**CHAT, "stream": True}).status_code == 200
        for number in range(20):
            assert client.post("/api/chat", json={**CHAT, "model": f"invented-{number}"}).status_code == 403
        assert [limited.post("/api/chat", json=CHAT).status_code for _ in range(2)] == [200, 429]
        assert stranger.get("/v1/models").status_code == 401
        assert client.get("/nowhere").status_code == 404
    found = fresh(gateway)
    requests = "gateway_requests_total"
    assert total(found, requests, dialect="ollama", route="/api/chat", model=MODEL, outcome="answered") == 4
    assert total(found, requests, dialect="openai", route="/v1/chat/completions", model=MODEL, outcome="answered") == 1
    assert total(found, requests, model="other", outcome="refused:model_not_available") == 20
    assert {dict(labels)["model"] for name, labels in found if name == requests} == {MODEL, "other", ""}
    assert total(found, requests, route="unmatched") == 1
    assert total(found, "gateway_limit_refusals_total", limit="rpm") == 1
    assert total(found, "gateway_auth_failures_total") == 1
    assert total(found, "gateway_backend_attempts_total", backend="alpha") == 5
    assert total(found, "gateway_backend_attempts_total", backend="beta") == 1
    assert total(found, "gateway_backend_failures_total", backend="alpha", reason="bad_status") == 1
    assert total(found, "gateway_time_to_first_byte_seconds_count") == 5 == total(found, "gateway_overhead_seconds_count")
    assert total(found, "gateway_overhead_seconds_sum") < total(found, "gateway_time_to_first_byte_seconds_sum")
    assert total(found, "gateway_requests_in_flight") == 0
    rows = gateway.audit_rows()
    for kind in ("prompt", "completion"):
        assert total(found, "gateway_tokens_total", kind=kind) == sum(row[f"{kind}_tokens"] for row in rows) > 0
    assert total(found, "gateway_cached_tokens_total", model=MODEL) == sum(row["cached_tokens"] or 0 for row in rows) == 4


def test_requests_of_each_dialect_and_their_translations_are_counted(start_gateway: StartGateway) -> None:
    with (
        FakeBackend(models=["native:4b"], is_native=True) as native,
        FakeBackend("openai", ["plain:7b"], name="plain") as plain,
    ):
        gateway = start_gateway(native, plain, METRICS_TOKEN=TOKEN)
        until(lambda: all(found.routes_at for found in gateway.components.discovery.catalog.snapshots))
        with gateway.http(gateway.key()) as client:
            for model in ("native:4b", "plain:7b"):
                assert client.post("/v1/messages", json={**CHAT, "model": model, "max_tokens": 9}).status_code == 200
                assert client.post("/v1/responses", json={"model": model, "input": "Hello"}).status_code == 200
            for _ in range(2):
                assert client.post("/api/chat", json={**CHAT, "model": "plain:7b"}).status_code == 200
            assert client.post("/api/embed", json={"model": "plain:7b", "input": "Hello"}).status_code == 200
            assert client.post("/v1/messages", json={**CHAT, "model": "missing", "max_tokens": 9}).status_code == 403
        found = fresh(gateway)
    for dialect, route in (("anthropic", "/v1/messages"), ("responses", "/v1/responses")):
        assert total(found, "gateway_requests_total", dialect=dialect, route=route, outcome="answered") == 2
        for name in ("time_to_first_byte", "overhead"):
            assert total(found, f"gateway_{name}_seconds_count", dialect=dialect) == 2
    assert total(found, "gateway_request_duration_seconds_count", dialect="anthropic") == 3
    translated = {labels: count for (name, labels), count in found.items() if name == "gateway_translated_requests_total"}
    assert {(dict(labels)["dialect"], dict(labels)["to"]): count for labels, count in translated.items()} == {
        ("anthropic", "/v1/chat/completions"): 1,
        ("responses", "/v1/chat/completions"): 1,
        ("ollama", "/v1/chat/completions"): 2,
        ("ollama", "/v1/embeddings"): 1,
    }


def test_gauges_show_what_is_up(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> None:
    beta.stop()
    gateway = start_gateway(alpha, beta, METRICS_TOKEN=TOKEN)
    with gateway.http(gateway.key()) as client:
        assert client.post("/api/chat", json=CHAT).status_code == 200
    until(lambda: total(scraped(gateway.url), "gateway_audit_rows_written_total") == 1, 10)
    found = fresh(gateway)
    assert total(found, "gateway_backend_up", backend="alpha") == 1
    assert total(found, "gateway_backend_up", backend="beta") == 0
    assert total(found, "gateway_backend_breaker_state", backend="alpha") == 0
    assert total(found, "gateway_store_up", store="redis") == total(found, "gateway_store_up", store="postgresql") == 1
    assert total(found, "gateway_limits_degraded") == total(found, "gateway_draining") == 0
    assert total(found, "gateway_audit_rows_held") == total(found, "gateway_audit_rows_waiting") == 0
    assert total(found, "gateway_store_calls_total", store="redis") > 10
    assert total(found, "gateway_store_calls_total", store="postgresql") > 0
    assert total(found, "gateway_event_loop_lag_seconds_count") >= 1


def test_what_is_loaded_and_the_slots_are_shown(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    entries = [{"name": name, "size_vram": 500} for name in ("llama3.2", "other")]
    alpha.play("/api/ps", answer(200, {"models": entries[:1]}))
    with FakeBackend("openai", ["vllm"], name="gamma") as gamma:
        gateway = start_gateway(alpha, entry_of(gamma, slots=7), METRICS_TOKEN=TOKEN, OLLAMA_SLOTS="0")
        until(lambda: gateway.components.load.view()["alpha"].used == 500, 5)
        alpha.play("/api/ps", answer(200, {"models": entries}))
        gateway.loop.call_soon_threadsafe(gateway.components.load.look_soon, "alpha")
        until(lambda: gateway.components.load.view()["alpha"].used == 1000, 5)
        alpha.models[:] = ["new"]
        gateway.call(gateway.components.discovery.refresh())
        found = fresh(gateway)
    for name, expected in (("vram_used_bytes", 1000), ("vram_seen_bytes", 1000), ("loaded_models", 2), ("loads_seen", 1)):
        assert total(found, f"gateway_backend_{name}", backend="alpha") == expected, name
    assert total(found, "gateway_backend_evictions_seen", backend="alpha") == 0
    assert total(found, "gateway_backend_slots", backend="gamma", model="vllm:latest", source="configured") == 7
    assert total(found, "gateway_backend_slots", backend="alpha", model="new:latest", source="default") == 1
    assert total(found, "gateway_backend_slots", backend="alpha", model="llama3.2:latest") == 0


def test_queues_slots_choices_and_estimates_are_shown(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(entry_of(alpha, slots=1), METRICS_TOKEN=TOKEN, QUEUE_SIZE="2")
    key = gateway.key(concurrent=10)
    alpha.healthy.pause_s = 0.45
    stream = {**CHAT, "stream": True}

    def ask() -> None:
        with gateway.http(key) as client:
            client.post("/api/chat", json=stream)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    threads[0].start()
    until(lambda: alpha.in_flight == 1, 5)
    for number, thread in enumerate(threads[1:], 1):
        thread.start()
        until(lambda: gateway.components.placing.queue.length == number, 5)  # noqa: B023
    with gateway.http(key) as client:
        assert client.post("/api/chat", json=CHAT).json()["error"].startswith("As many requests wait")
    until(lambda: total(scraped(gateway.url), "gateway_fleet_queue_calls", model=MODEL) == 2, 5)
    busy = scraped(gateway.url)
    assert total(busy, "gateway_backend_slots_in_use", backend="alpha", model=MODEL) == 1
    assert total(busy, "gateway_fleet_queue_tokens", model=MODEL) > 1
    assert total(busy, "gateway_fleet_queue_oldest_seconds", model=MODEL) > 0
    alpha.healthy.pause_s = 0.0
    for thread in threads:
        thread.join(20)
    found = fresh(gateway)
    for name in ("gateway_fleet_queue_calls", "gateway_fleet_queue_oldest_seconds", "gateway_backend_slots_in_use"):
        assert {value for (name_found, _), value in found.items() if name_found == name} == {0}, name
    assert total(found, "gateway_fleet_queue_refusals_total", model=MODEL, reason="queue_full") == 1
    assert total(found, "gateway_fleet_choices_total", backend="alpha", because="order") == 3
    assert total(found, "gateway_fleet_wait_seconds_count") == 2 and total(found, "gateway_queue_wait_seconds_count") == 0
    assert total(found, "gateway_fleet_estimate_error_ratio_count") == 3
    rows = [row for row in gateway.audit_rows() if row["status"] == 200]
    for kind, column in (("estimated", "estimated_ms"), ("real", "ttfb_ms")):
        sum_s = sum(row[column] for row in rows) / 1000
        assert total(found, "gateway_fleet_estimated_seconds_total", kind=kind) == pytest.approx(sum_s, abs=0.05)


@pytest.mark.parametrize("header", ["", "Bearer wrong", f"Bearer {TOKEN}x"])
def test_other_callers_get_404(start_gateway: StartGateway, alpha: FakeBackend, header: str) -> None:
    gateway = start_gateway(alpha, METRICS_TOKEN=TOKEN)
    headers = {"Authorization": header} if header else {}
    with gateway.http() as client:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            here = client.request(method, "/metrics", headers=headers)
            nowhere = client.request(method, "/nowhere", headers=headers)
            assert (here.status_code, here.content) == (nowhere.status_code, nowhere.content)
            assert set(here.headers) == set(nowhere.headers)
    assert scraped(gateway.url), "who has the token reads them"
    routes = [line["route"] for line in gateway.request_lines()]
    assert routes == ["unmatched"] * 10, "a scrape says nothing in the log, an attempt does"


def test_metrics_are_off_by_default(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key()) as client:
        assert client.get("/metrics").status_code == 404


def test_allowed_addresses_may_read_metrics(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha, METRICS_ALLOW="127.0.0.0/8, ::1", GATEWAY_TRUSTED_PROXIES="127.0.0.1")
    with gateway.http() as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/metrics", headers={"X-Forwarded-For": "192.0.2.7"}).status_code == 404


def test_the_overhead_is_shown_to_keys_with_the_flag(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http(gateway.key(flags=("show_overhead",))) as shown_to, gateway.http(gateway.key()) as hidden_from:
        shown = shown_to.post("/api/chat", json=CHAT)
        assert 0 < float(shown.headers["x-gateway-overhead-ms"]) < shown.elapsed.total_seconds() * 1000
        assert "x-gateway-overhead-ms" not in hidden_from.post("/api/chat", json=CHAT).headers


@contextmanager
def scraping(url: str, into: list[Samples], wanted: int) -> Iterator[None]:
    """Scrapes in a thread during the block, at least so many."""

    def scrape() -> None:
        while len(into) < wanted:
            # A worker that is killed takes the connection with it.
            with suppress(httpx.TransportError):
                into.append(scraped(url))

    thread = threading.Thread(target=scrape)
    thread.start()
    yield
    thread.join(60)
    assert len(into) >= wanted


async def ask_many(url: str, key: str, requests: int) -> int:
    """Uses new connections, so that all workers get some; returns how many were answered."""
    gate = asyncio.Semaphore(20)

    async def one() -> int:
        async with gate, httpx.AsyncClient(timeout=30) as client:
            asked = await client.post(f"{url}/api/chat", json=CHAT, headers={"Authorization": f"Bearer {key}"})
            return int(asked.status_code == 200)

    return sum(await asyncio.gather(*(one() for _ in range(requests))))


@pytest.mark.long(seconds=14)
def test_counts_of_all_workers_are_summed_even_after_they_end(tmp_path: Path, stores: TestStores, alpha: FakeBackend) -> None:
    names = environment_for(
        alpha, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, GATEWAY_WORKERS="4", METRICS_TOKEN=TOKEN
    )
    key = operate(tmp_path, names, "key", "--name", "counted").split()[-1]
    scrapes: list[Samples] = []
    with serving(tmp_path, {**names, "TMPDIR": str(tmp_path)}) as (process, url, _):
        with scraping(url, scrapes, 100):
            answered = asyncio.run(ask_many(url, key, 150))
            for _ in range(3):
                workers = descendants(process.pid)
                os.kill(min(workers), signal.SIGKILL)
                until(lambda: len(descendants(process.pid) - workers) == 1, 10)  # noqa: B023
            answered += asyncio.run(ask_many(url, key, 150))
        until(lambda: sql(stores.database_url, "SELECT count(*) FROM audit") == [300], 20)
        last = scraped(url)
        [folder] = tmp_path.glob("nz-metrics-*")
        kept = Counter(file.name.split("_")[0] for file in folder.glob("*.db"))
    assert answered == 300 == total(last, "gateway_requests_total", outcome="answered")
    assert total(last, "gateway_request_duration_seconds_count") == 300
    assert kept["counter"] <= 5 and kept["histogram"] <= 5, "four that live, and one for all before them"
    assert total(last, "gateway_limits_degraded") == 0
    for earlier, later in zip(scrapes, [*scrapes[1:], last], strict=True):
        shrunk = [name for name, value in earlier.items() if name[0].endswith(GROWING) and later.get(name, 0) < value]
        assert shrunk == []
    assert not list(tmp_path.glob("nz-metrics-*")), "nothing is left behind"


def declared() -> dict[str, str]:
    """Every name that a scrape can show, with its family."""
    found: dict[str, str] = {}
    for family in Metrics().families():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"]}.get(family.type, [""])
        found |= {family.name + suffix: family.name + suffixes[0].replace("_bucket", "") for suffix in suffixes}
    return found


def test_the_dashboard_and_the_alerts_use_existing_metrics() -> None:
    dashboard = json.loads((OPS / "grafana.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((OPS / "alerts.yaml").read_text())
    asked += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    names = {name for expression in asked for name in NAME.findall(expression)}
    assert names <= declared().keys()
    assert set(declared().values()) == {declared()[name] for name in names}, "each is shown somewhere"


def test_the_page_of_metrics_lists_every_metric() -> None:
    listed = re.findall(r"^\| `(gateway_[a-z_]+)", page(PAGE), re.MULTILINE)
    assert sorted(listed) == sorted(set(declared().values()))


def test_the_page_of_metrics_has_the_labels_of_each() -> None:
    rows = {name.strip("`"): re.findall(r"`(\w+)`", labels) for name, labels, _ in tables(section(PAGE, "List"))}
    families = {family._name: list(family._labelnames) for family in vars(Metrics()).values() if hasattr(family, "_labelnames")}
    assert {name.removesuffix("_total"): labels for name, labels in rows.items()} == families


def test_reading_waits_for_a_file_that_a_worker_has_just_created(tmp_path: Path) -> None:
    begun = tmp_path / "counter_1.db"
    begun.touch()
    threading.Timer(0.03, begun.unlink).start()
    assert asyncio.run(Metrics(tmp_path).exposition()) == b""
