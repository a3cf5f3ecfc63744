"""Who looks through the admin API is no traffic; who acts, or may not look, is in the audit."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from gateway.auth.key import ADMIN
from tests.admin.test_api import CHAT, MODEL
from tests.conftest import StartGateway, TestStores
from tests.pages.test_dashboard import enter
from tests.support import audit_rows
from tests.support.browser import page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway
from tests.telemetry.test_metrics import TOKEN, fresh, total

READS = (
    *("/overview", "/series?window=15m", "/backends", "/keys", "/audit", "/usage", f"/explain?key=ops&model={MODEL}"),
    *("/requests/unheard-of", "/series?window=1y"),
)


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, METRICS_TOKEN=TOKEN, DASHBOARD_ENABLED="true", DEFAULT_RPM="3")


@pytest.fixture
def admin(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.http(gateway.key(name="ops", flags=(ADMIN,))) as client:
        client.base_url = httpx.URL(f"{gateway.url}/admin/v1")
        yield client


def an_event(admin: httpx.Client) -> dict[str, Any]:
    with admin.stream("GET", "/events") as events:
        return dict(json.loads(next(events.iter_lines()).removeprefix("data: ")))


def test_reads_leave_no_trace_and_do_not_count_towards_default_limits(gateway: RunningGateway, admin: httpx.Client) -> None:
    assert [admin.get(path).status_code for path in READS] == [200] * 7 + [404, 400]
    assert admin.head("/overview").status_code == 200
    assert an_event(admin)["lately"]["requests"] == 0
    gateway.wait_idle()
    assert gateway.audit_rows() == [] and gateway.request_lines() == []
    found = fresh(gateway)
    for name in ("gateway_requests_total", "gateway_request_duration_seconds_count", "gateway_audit_rows_written_total"):
        assert total(found, name) == 0, name
    with gateway.http(gateway.key(name="busy")) as client:
        assert client.post("/api/chat", json=CHAT).status_code == 200
    assert [row["route"] for row in gateway.audit_rows()] == ["/api/chat"]
    assert [admin.post("/refresh").status_code for _ in range(4)] == [200, 200, 200, 429], "who acts has the usual limits"


def test_actions_and_refused_reads_are_in_the_audit(gateway: RunningGateway, admin: httpx.Client) -> None:
    admin.post("/refresh")
    admin.delete("/keys/nobody")
    with gateway.http(gateway.key(name="user")) as user, gateway.http("nz_wrong") as stranger:
        assert user.get("/admin/v1/keys").status_code == 403
        assert stranger.get("/admin/v1/keys").status_code == 401
    audited = [(row["method"], row["route"], row["status"]) for row in gateway.audit_rows()]
    assert audited == [
        ("POST", "/admin/v1/refresh", 200),
        ("DELETE", "/admin/v1/keys/{id}", 404),
        ("GET", "/admin/v1/keys", 403),
    ]
    assert [line["status"] for line in gateway.request_lines()] == [200, 404, 403, 401]
    found = fresh(gateway)
    assert total(found, "gateway_auth_failures_total") == 1
    assert total(found, "gateway_requests_total") == 4


def test_reports_ignore_reads_recorded_by_older_versions(
    gateway: RunningGateway, admin: httpx.Client, stores: TestStores
) -> None:
    [ops] = [row["id"] for row in admin.get("/keys").json()]
    overview_read = {"key_id": ops, "method": "GET", "route": "/admin/v1/overview", "model": "", "prompt_tokens": 0}
    now = datetime.now(UTC)
    audit_rows.write(stores.database_url, [audit_rows.row(now, **overview_read), audit_rows.row(now, key_id=ops)])
    until(lambda: admin.get("/overview").json()["lately"]["requests"], 10)
    lately = admin.get("/overview").json()["lately"]
    assert (lately["requests"], [row["requests"] for row in lately["keys"]]) == (1, [1])
    assert sum(step["requests"] for step in admin.get("/series").json()["steps"]) == 1
    assert [row["requests"] for row in admin.get("/usage").json()] == [1]
    assert len(admin.get("/audit").json()) == 2, "the audit forgets nothing"


def test_a_dashboard_that_watches_is_not_counted_as_in_progress(
    gateway: RunningGateway, admin: httpx.Client, browser: Browser
) -> None:
    with page_of(browser) as page:
        enter(page, gateway, gateway.key(flags=(ADMIN,)))
        expect(page.locator("#live")).to_have_text("● live")
        until(lambda: gateway.components.in_flight.total == 1, 10)
        time.sleep(1.2)  # until the process has published its state
        seen = page.locator("#tiles")
        until(lambda: admin.get("/overview").json()["processes"] == 1, 5)
        assert admin.get("/overview").json()["in_flight"] == 0
        expect(seen.locator(".tile", has_text="in progress").locator("b")).to_have_text("0")
        expect(page.locator("#busy-keys")).to_contain_text("no requests in the last 15 minutes")
    assert total(fresh(gateway), "gateway_requests_in_flight") == 0
