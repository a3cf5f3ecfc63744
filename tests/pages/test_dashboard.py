"""The dashboard in a real browser: what it shows, what it does, and that nothing said by others does anything."""

import json
import re
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from gateway import endpoints
from gateway.auth.key import ADMIN
from tests.conftest import StartGateway
from tests.support.browser import WIDTHS, page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}
GB = 10**9
XSS = "<img src=x onerror=alert(1)><script>alert(2)</script>"
LARGEST_PAGE = 100_000


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, beta, DASHBOARD_ENABLED="true")


@pytest.fixture
def admin(gateway: RunningGateway) -> str:
    return gateway.key(name="ops", flags=(ADMIN,))


def enter(page: Page, gateway: RunningGateway, key: str) -> None:
    page.goto(f"{gateway.url}/dashboard")
    page.fill("#key", key)
    page.click("#sign-in button")


def confirm(page: Page) -> None:
    page.click("#confirm")
    expect(page.locator("dialog")).not_to_be_visible()


def test_when_disabled_it_is_an_ordinary_404(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http() as client:
        for path in endpoints.DASHBOARD:
            here, nowhere = client.get(path), client.get("/nowhere")
            assert (here.status_code, here.content) == (404, nowhere.content)


def test_the_content_security_policy_and_the_size(gateway: RunningGateway) -> None:
    total = 0
    with gateway.http() as client:
        for path in endpoints.DASHBOARD:
            answer = client.get(path)
            policy = answer.headers["content-security-policy"]
            assert "unsafe" not in policy and "default-src 'none'" in policy and "http" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            # Namespaces are names; nothing is loaded from them.
            elsewhere = re.findall(r"(?:https?:)?//[a-z][\w.-]+", answer.text.replace("http://www.w3.org/2000/svg", ""))
            assert elsewhere == [], path
            total += len(answer.content)
    assert total < LARGEST_PAGE


def test_only_an_admin_gets_in(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    with page_of(browser, expecting=["status of 401", "box: 401", "status of 403", "box: 403: this needs"]) as page:
        enter(page, gateway, "nz_wrong")
        expect(page.locator("#problem")).to_contain_text("401")
        enter(page, gateway, gateway.key())
        expect(page.locator("#problem")).to_contain_text("403: this needs a key with the role admin")
        expect(page.locator("#overview")).not_to_be_visible()
        enter(page, gateway, admin)
        expect(page.locator("#backends tbody tr")).to_have_count(2)
        page.reload()
        expect(page.locator("#backends tbody tr")).to_have_count(2)
        assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
        page.click("#sign-out")
        expect(page.locator("#sign-in")).to_be_visible()
        assert page.evaluate("sessionStorage.length") == 0


def test_errors_for_a_trailing_slash_and_for_a_key_without_the_role_give_advice(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key()) as client:
        assert "did you mean /dashboard?" in client.get("/dashboard/").text
        assert "did you mean" not in client.get("/playground/").text, "it is not enabled"
        assert "make key NAME=ops ROLE=admin" in client.get("/admin/v1/overview").text


def test_no_label_of_a_plot_is_cut(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    def slow(route: Route) -> None:
        series = route.fetch().json()
        middle = datetime.fromisoformat(series["since"]).timestamp() + 900
        at = middle // series["step_s"] * series["step_s"]
        numbers = dict.fromkeys(("requests", "refused", "failures", "prompt_tokens", "completion_tokens"), 2174000)
        route.fulfill(json={**series, "steps": [{**numbers, "at": at, "ttfb_p50_ms": 2174.0, "ttfb_p99_ms": 12174.0}]})

    with page_of(browser) as page:
        page.route("**/series?*", slow)
        enter(page, gateway, admin)
        expect(page.locator("#plots svg")).to_have_count(4)
        lefts = "all => all.map(text => text.getBoundingClientRect().left - text.closest('svg').getBoundingClientRect().left)"
        assert min(page.locator("#plots svg text").evaluate_all(lefts)) >= 0


def test_numbers_are_live_and_link_to_their_rows(
    gateway: RunningGateway, admin: str, alpha: FakeBackend, browser: Browser
) -> None:
    tight = gateway.key(name="tight", rpm=1)
    alpha.healthy.cached = lambda _: 1
    with page_of(browser) as page:
        enter(page, gateway, admin)
        expect(page.locator("#live")).to_contain_text("live")
        expect(page.locator("#plots svg")).to_have_count(4)
        with gateway.http(gateway.key(name="busy")) as busy, gateway.http(tight) as limited:
            for _ in range(4):
                busy.post("/api/chat", json=CHAT)
            assert [limited.post("/api/chat", json=CHAT).status_code for _ in range(3)] == [200, 429, 429]
        limit = page.locator("#busy-keys").get_by_role("button", name="2 (rpm)")
        expect(limit).to_be_visible(timeout=20_000)
        limit.click()
        expect(page.locator("#rows tbody tr")).to_have_count(2)
        expect(page.locator("#rows tbody tr").first).to_contain_text("refused:rate_limit_exceeded (rpm)")
        page.locator("#rows tbody button").first.click()
        expect(page.locator("dialog pre")).to_contain_text('"status": 429')
        page.keyboard.press("Escape")
        page.click("[data-tab=overview]")
        page.locator("#busy-models").get_by_role("button", name=MODEL).click()
        expect(page.locator("#rows tbody tr")).to_have_count(7)
        expect(page.locator("#rows tbody tr").last).to_contain_text("1 (1 cached) + 4")
        expect(page.locator("#tiles")).to_contain_text("tokens in + out; 5 cached")
        page.click("[data-tab=overview]")
        page.click("[data-window='24h']")
        expect(page.locator("[data-window='24h']")).to_have_attribute("aria-pressed", "true")
        expect(page.locator("#plots circle").first).to_be_attached()


def test_a_double_click_creates_one_key_which_can_be_copied_without_tls(
    gateway: RunningGateway, admin: str, browser: Browser
) -> None:
    with page_of(browser) as page:
        page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
        enter(page, gateway, admin)
        page.click("[data-tab=keys]")
        page.click("#create-key")
        page.fill("[name=name]", "once")
        page.evaluate("for (const _ of [1, 2, 3]) document.getElementById('save').click()")
        made = page.locator("#new-key").inner_text()
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        page.get_by_role("button", name="Close").click()
        page.focus("#find-key")
        page.keyboard.press("Control+V")
        expect(page.locator("#find-key")).to_have_value(made)
    audited = [row for row in gateway.audit_rows() if (row["method"], row["route"]) == ("POST", "/admin/v1/keys")]
    assert [row["status"] for row in audited] == [201]


def test_keys_are_created_limited_rotated_and_revoked(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    with page_of(browser, expecting=["status of 409", "box: 409: a key named 'ops' exists"]) as page:
        enter(page, gateway, admin)
        page.click("[data-tab=keys]")
        page.click("#create-key")
        page.fill("[name=name]", "alice")
        page.fill("[name=models]", "llama3*")
        page.fill("[name=rpm]", "5")
        page.click("#save")
        first = page.locator("#new-key").inner_text()
        page.get_by_role("button", name="Close").click()
        with gateway.http(first) as client:
            assert client.post("/api/chat", json=CHAT).status_code == 200
        page.fill("#find-key", "alice")
        alice = page.locator("#all-keys tbody tr").filter(has_text="alice")
        expect(alice).to_contain_text("rpm 5")
        alice.get_by_role("button", name="Limits").click()
        page.fill("[name=rpm]", "unlimited")
        page.click("#save")
        confirm(page)
        expect(alice).to_contain_text("rpm unlimited")
        alice.get_by_role("button", name="Rotate").click()
        page.click("#confirm")
        second = page.locator("#new-key").inner_text()
        assert second.startswith("nz_") and second != first
        page.get_by_role("button", name="Close").click()
        alice.get_by_role("button", name="Revoke").click()
        page.get_by_role("button", name="Cancel").click()
        with gateway.http(second) as client:
            assert client.get("/v1/models").status_code == 200, "nothing happens without a confirmation"
            alice.get_by_role("button", name="Revoke").click()
            confirm(page)
            expect(alice).to_contain_text("revoked")
            until(lambda: client.get("/v1/models").status_code == 401, 5)
        page.fill("#find-key", "")
        page.click("#create-key")
        page.fill("[name=name]", "ops")
        page.keyboard.press("Enter")
        expect(page.locator("#dialog-problem")).to_contain_text("a key named 'ops' exists")
        expect(page.locator("dialog [name=name]")).to_have_value("ops")
    gateway.wait_idle()
    audited = [row["detail"] for row in gateway.audit_rows() if row["method"] != "GET" and row["route"].startswith("/admin")]
    assert [detail.split()[0] for detail in audited] == ["make", "limit", "rotate", "revoke", "make"]


def test_backends_are_drained_probed_and_refreshed(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    with page_of(browser) as page:
        enter(page, gateway, admin)
        alpha = page.locator("#backends tbody tr").filter(has_text="alpha")
        expect(alpha.locator('[data-label="Speaks"]')).to_have_text("ollama, openai")
        alpha.get_by_role("button", name="Drain").click()
        confirm(page)
        expect(alpha).to_contain_text("drained")
        until(lambda: gateway.components.backends["alpha"].is_drained, 5)
        alpha.get_by_role("button", name="Undrain").click()
        confirm(page)
        expect(alpha).not_to_contain_text("drained")
        alpha.get_by_role("button", name="Probe").click()
        expect(page.locator("dialog pre")).to_contain_text('"reachable": true')
        expect(page.locator("dialog pre")).to_contain_text('"speaks"')
        page.keyboard.press("Escape")
        page.click("#refresh")
        expect(page.locator("dialog pre")).to_contain_text('"models": 1')


def test_the_fleet_its_queues_and_its_loads_are_shown(
    gateway: RunningGateway, admin: str, alpha: FakeBackend, browser: Browser
) -> None:
    place = {"model": MODEL, "is_loaded": True, "vram": 5 * GB, "context": 4096, "left_s": 250.0, "slots": 4, "in_use": 3}
    place |= {"slots_from": "configured", "load_s": 4.2, "prefill_tps": 2345.6, "decode_tps": 51.2}
    idle = {**place, "model": XSS, "in_use": 0, "left_s": None, "slots": 12, "prefill_tps": None, "decode_tps": None}
    memory = {"used": 12 * GB, "seen": 24 * GB, "loads": 7, "evictions": 1, "error": ""}
    lately = {"backend": "alpha", "requests": 9, "tokens": 1, "cached_tokens": 0, "backend_s": 31.0, "loads": 2, "load_s": 8.0}
    queue = {"model": MODEL, "calls": 5, "tokens": 12345, "oldest_s": 7.04, "first_s": 1.0, "last_s": None}
    key_id = gateway.key(name="alice").split("_")[1]
    loading_key = {"key_id": key_id, "key": "alice", "loads": 2, "load_s": 8.0, "model": MODEL}

    def at_work(route: Route) -> None:
        seen = route.fetch().json()
        seen["backends"][0] |= {"memory": memory, "places": [place, *[idle] * 9], "lately": lately}
        seen["backends"][0]["loading"] = {"model": "qwen3:32b", "for_s": 3.0, "left_s": 4.04}
        seen["backends"][1] |= {"memory": None, "places": [], "lately": None, "state": "away"}
        seen |= {"queues": [queue], "waiting_for_backends": 5}
        seen["lately"] |= {"loading_keys": [loading_key], "waited": 3, "wait_p50_ms": 1234.0, "wait_p99_ms": 20_000.0}
        route.fulfill(json=seen)

    with page_of(browser, expecting=["503", "Failed to load"]) as page:
        page.route("**/admin/v1/overview", at_work)
        page.route("**/admin/v1/events", lambda route: route.fulfill(status=503, json={"error": "not now"}))
        enter(page, gateway, admin)
        expect(page.locator(".backend")).to_have_count(2)
        first, second = page.locator(".backend").all()
        expect(first).to_contain_text("12.0 GB loaded, at most 24.0 GB seen")
        expect(first.locator("progress").nth(0)).to_have_attribute("value", str(12 * GB))
        expect(first).to_contain_text("loading qwen3:32b, about 4.0 s left")
        expect(first.locator(".places li").nth(0)).to_contain_text(
            "3/4●●●○5.0 GB · 4 min left · 2,346 in, 51 out tok/s · load 4.2 s"
        )
        expect(first.locator(".places li").nth(1)).to_contain_text("0/125.0 GB · stays")
        expect(first).to_contain_text("15 min: 9 calls, 31 s busy, 2 loads (8.0 s)")
        expect(first).to_contain_text("seen: 7 loads, 1 eviction")
        first.get_by_text("4 more models").click()
        expect(first.locator("details li").last).to_contain_text("<img")
        expect(second).to_contain_text("down")
        expect(page.locator("#queues tbody")).to_contain_text(f"{MODEL}512 k7.0 s1.0 s–")
        expect(page.locator("#loading-keys tbody")).to_contain_text(f"alice28.0 s{MODEL}")
        expect(page.locator("#tiles")).to_contain_text("3had to wait; p50 1.2 s, p99 20 s")
        expect(page.locator("#tiles")).to_contain_text("5waiting for a backend")
        page.locator("#loading-keys").get_by_role("button", name="alice").click()
        expect(page.locator("#filter [name=key]")).to_have_value(key_id)


def test_requests_show_how_they_were_translated(start_gateway: StartGateway, alpha: FakeBackend, browser: Browser) -> None:
    with FakeBackend("openai", ["plain:7b"], name="plain") as plain:
        gateway = start_gateway(alpha, plain, DASHBOARD_ENABLED="true")
        with gateway.http(gateway.key()) as client:
            client.post("/api/chat", json=CHAT)
            sent = {**CHAT, "model": "plain:7b", "max_tokens": 9, "tools": [{"type": f"{XSS}_2025", "name": "a"}]}
            assert client.post("/v1/messages", json=sent).status_code == 200
        with page_of(browser) as page:
            enter(page, gateway, gateway.key(name="ops", flags=(ADMIN,)))
            page.click("[data-tab=audit]")
            cells = page.locator('#rows [data-label="Backend"]')
            expect(cells).to_have_count(2)
            expect(cells.nth(0)).to_contain_text("order, translated to /v1/chat/completions, dropped tools.?img?src?x")
            expect(cells.nth(1)).to_have_text("alphaorder")
            expect(page.locator('#rows [data-label="First byte"]').nth(1)).to_contain_text("estimate")
            page.locator("#rows tbody button").first.click()
            expect(page.locator("dialog pre")).to_contain_text('"translated_to": "/v1/chat/completions"')


def test_content_from_others_is_never_markup(start_gateway: StartGateway, beta: FakeBackend, browser: Browser) -> None:
    with FakeBackend(models=[MODEL, XSS], name="alpha") as evil:
        gateway = start_gateway(evil, beta, DASHBOARD_ENABLED="true")
        admin = gateway.key(name="ops", flags=(ADMIN,))
        with gateway.http(gateway.key(name=XSS), headers={"User-Agent": XSS, "X-Request-ID": "x"}) as client:
            for model in (XSS, f"unknown {XSS}"):
                client.post("/api/chat", json={**CHAT, "model": model})
        with page_of(browser) as page:
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            enter(page, gateway, admin)
            expect(page.locator("#busy-keys")).to_contain_text("<img", timeout=20_000)
            page.click("[data-tab=keys]")
            expect(page.locator("#all-keys")).to_contain_text("<img")
            page.click("[data-tab=audit]")
            expect(page.locator("#rows")).to_contain_text("<img")
            page.fill("[name=outcome]", XSS)
            page.click("#filter button")
            assert page.locator("main img").count() == page.locator("main script").count() == 0
            assert {urlsplit(url).netloc for url in asked} == {urlsplit(gateway.url).netloc}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut(gateway: RunningGateway, admin: str, width: str, scheme: str, tmp_path: Path, browser: Browser) -> None:
    with gateway.http(gateway.key(name="a key with quite a long name of its own " * 3)) as client:
        client.post("/api/chat", json=CHAT)
    with page_of(browser, width, scheme) as page:
        enter(page, gateway, admin)
        expect(page.locator("#live")).to_contain_text("live")
        for tab in ("overview", "keys", "audit"):
            page.click(f"[data-tab={tab}]")
            expect(page.locator(f"#{tab} tbody tr").first).to_be_visible()
            too_wide = page.evaluate(
                "[...document.querySelectorAll('main:not([hidden]) *, header *')].filter((node) => node.checkVisibility() && "
                "node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 90))"
            )
            assert too_wide == [], json.dumps(too_wide)
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "light dark"


def test_a_thousand_keys_and_fifty_backends(start_gateway: StartGateway, alpha: FakeBackend, browser: Browser) -> None:
    others = [{"name": f"backend-{n}", "base_url": f"http://127.0.0.1:{n + 1}", "kind": "ollama"} for n in range(49)]
    gateway = start_gateway(alpha, *others, DASHBOARD_ENABLED="true")
    for number in range(1000):
        gateway.key(name=f"key number {number}")
    with page_of(browser) as page:
        enter(page, gateway, gateway.key(name="ops", flags=(ADMIN,)))
        expect(page.locator("#backends tbody tr")).to_have_count(50)
        expect(page.locator("#fleet .backend:visible")).to_have_count(12)
        page.get_by_text("38 more backends").click()
        expect(page.locator("#fleet .backend:visible")).to_have_count(50)
        page.click("[data-tab=keys]")
        expect(page.locator("#keys-shown")).to_contain_text("200 of 1,001 keys")
        page.fill("#find-key", "number 77")
        expect(page.locator("#all-keys tbody tr")).to_have_count(11)


def test_a_revoked_admin_is_signed_out(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    with page_of(browser, expecting=["status of 401", "box: 401"]) as page:
        enter(page, gateway, admin)
        expect(page.locator("#live")).to_contain_text("live")
        gateway.call(gateway.key_store().revoke("ops"))
        expect(page.locator("#problem")).to_contain_text("401", timeout=15_000)
        expect(page.locator("#sign-in")).to_be_visible()
