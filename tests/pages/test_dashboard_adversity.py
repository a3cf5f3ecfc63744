"""The dashboard beside hasty hands, late answers and a gateway that stands still: it stays where the user is, and true."""

import time
from collections.abc import Callable

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from gateway.auth.key import ADMIN
from tests.conftest import StartGateway
from tests.pages.test_dashboard import CHAT, enter
from tests.support.browser import page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, beta, DASHBOARD_ENABLED="true", DOCS_ENABLED="true")


@pytest.fixture
def admin(gateway: RunningGateway) -> str:
    return gateway.key(name="ops", flags=(ADMIN,))


def holding(routes: list[Route]) -> Callable[[Route], None]:
    def hold(route: Route) -> None:
        routes.append(route)

    return hold


def next_numbers(page: Page, gateway: RunningGateway, key: str) -> None:
    """Until the page has drawn numbers that are not those of before."""
    before = page.locator("#tiles").inner_text()
    with gateway.http(key) as client:
        client.post("/api/chat", json=CHAT)
    page.wait_for_function("before => document.getElementById('tiles').innerText !== before", arg=before, timeout=20_000)


def test_the_focus_stays_while_numbers_change(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    busy = gateway.key(name="busy")
    with page_of(browser) as page:
        enter(page, gateway, admin)
        expect(page.locator("#backends tbody tr")).to_have_count(2)
        drain = page.locator("#backends tr", has_text="beta").get_by_role("button", name="Drain")
        drain.focus()
        page.evaluate("window.first = document.activeElement; window.tile = document.querySelector('button.tile')")
        next_numbers(page, gateway, busy)
        assert page.evaluate("window.first === document.activeElement && window.first.isConnected && window.tile.isConnected")
        drain.click()
        expect(page.locator("dialog")).to_contain_text("Stop sending new requests to beta?")


def test_a_new_key_stays_until_it_is_closed(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    """A late answer to something else does not take its place, nor does one hasty Escape; closed, it is nowhere."""
    late: list[Route] = []
    with page_of(browser, expecting=["box: This key is not copied yet"]) as page:
        page.route("**/probe", holding(late))
        enter(page, gateway, admin)
        page.locator("#backends tr", has_text="alpha").get_by_role("button", name="Probe").click()
        expect(page.locator("dialog")).to_contain_text("Loading…")
        page.get_by_role("button", name="Close").click()
        page.click("[data-tab=keys]")
        page.click("#create-key")
        page.fill("[name=name]", "fresh")
        page.keyboard.press("Enter")
        made = page.locator("#new-key").inner_text()
        late[0].fulfill(json={"reachable": True})
        page.wait_for_timeout(300)
        expect(page.locator("#new-key")).to_have_text(made)
        page.keyboard.press("Escape")
        expect(page.locator("#dialog-problem")).to_contain_text("not copied yet")
        expect(page.locator("#new-key")).to_have_text(made)
        page.get_by_role("button", name="Close").click()
        expect(page.locator("dialog")).not_to_be_visible()
        expect(page.locator("#new-key")).to_have_count(0)
        assert made not in page.content()


def test_signing_out_leaves_nothing_for_the_next_user(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    gateway.key(name="somebody of ours")
    with page_of(browser) as page:
        enter(page, gateway, admin)
        page.click("[data-tab=keys]")
        expect(page.locator("#all-keys")).to_contain_text("somebody of ours")
        page.click("#sign-out")
        assert "somebody of ours" not in page.content() and page.locator("tbody tr").count() == 0


def test_a_gateway_that_hangs_is_not_shown_as_live(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    """Its loop is held up, as by a machine that sleeps: the connection stands, and nothing comes."""
    with page_of(browser) as page:
        page.clock.install()
        enter(page, gateway, admin)
        expect(page.locator("#live")).to_have_text("● live")
        gateway.loop.call_soon_threadsafe(time.sleep, 4)
        page.clock.fast_forward(9_000)
        expect(page.locator("#live")).to_contain_text("disconnected, retrying")
        page.clock.fast_forward(2_000)
        page.clock.resume()
        expect(page.locator("#live")).to_have_text("● live", timeout=15_000)


def test_plots_show_steps_without_requests_as_zero(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    """Whatever clock the browser has; and one who hears the page is told the values."""
    step = {"refused": 0, "failures": 0, "prompt_tokens": 6, "completion_tokens": 6, "ttfb_p50_ms": 5.0, "ttfb_p99_ms": 5.0}
    since = "2026-01-31T12:00:00+00:00"
    at = 1_769_860_800
    steps = [{**step, "at": at + 60, "requests": 3}, {**step, "at": at + 600, "requests": 3}]
    with page_of(browser) as page:
        page.route(
            "**/series*", lambda route: route.fulfill(json={"window": "15m", "step_s": 15, "since": since, "steps": steps})
        )
        enter(page, gateway, admin)
        expect(page.locator("#plots svg")).to_have_count(4)
        asked = page.locator("#plots svg").first
        ys = [float(point.split(",")[1]) for point in (asked.locator("polyline.one").get_attribute("points") or "").split()]
        xs = [float(point.split(",")[0]) for point in (asked.locator("polyline.one").get_attribute("points") or "").split()]
        assert len(ys) > 55 and sorted(set(ys)) == [8.0, 112.0] and ys.count(8.0) == 2
        assert min(xs) >= 44 - 8 and max(xs) <= 400
        assert page.locator("#plots svg").nth(3).locator("polyline.one").count() == 2
        assert "all at most 12, latest 0" in (asked.get_attribute("aria-label") or "")


def test_the_last_window_asked_for_is_shown(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    held: list[Route] = []
    with page_of(browser) as page:
        enter(page, gateway, admin)
        expect(page.locator("#plots svg")).to_have_count(4)
        page.route("**/series?window=24h", holding(held))
        page.click("[data-window='24h']")
        page.click("[data-window='30d']")
        page.wait_for_timeout(500)
        shown = page.locator("#plots").inner_html()
        held[0].continue_()
        page.wait_for_timeout(500)
        assert page.locator("#plots").inner_html() == shown


def test_many_loaded_models_are_folded(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    with page_of(browser, expecting=["net::ERR_FAILED"]) as page:
        enter(page, gateway, admin)
        row = page.locator("#backends tr", has_text="alpha")
        expect(row).to_be_visible()
        with gateway.http(admin) as client:
            facts = client.get("/admin/v1/overview").json()
        facts["backends"][0]["running"] = [f"model-{n}:latest" for n in range(40)]
        page.route("**/admin/v1/events", lambda route: route.abort())
        page.route("**/admin/v1/overview", lambda route: route.fulfill(json=facts))
        page.reload()
        expect(row.locator("summary")).to_contain_text("model-4:latest and 35 more")
        expect(row).not_to_contain_text("model-39", use_inner_text=True)


def test_the_documentation_opens_the_route_in_its_url(gateway: RunningGateway, browser: Browser) -> None:
    with page_of(browser) as page:
        page.goto(f"{gateway.url}/docs#%")
        expect(page.locator(".route").first).to_be_visible()
        expect(page.locator("#problem")).not_to_be_visible()
        page.evaluate("location.hash = '#get_v1_models'")
        expect(page.locator("#get_v1_models")).to_have_attribute("open", "")
        page.fill("#find", "no such route at all")
        expect(page.locator("#nothing")).to_be_visible()
        page.fill("#find", "")
        expect(page.locator("#nothing")).not_to_be_visible()


def test_answers_of_a_gateway_of_the_version_before_are_shown(gateway: RunningGateway, admin: str, browser: Browser) -> None:
    """During an update the page may be of one version and the answer of the other."""
    new = ("speaks", "translated_to", "dropped", "memory", "loading", "places", "lately", "chosen_because", "estimated_ms")
    new_sums = ("waited", "wait_p50_ms", "wait_p99_ms", "loading_keys")

    def without_new(route: Route) -> None:
        value = route.fetch().json()
        rows = value if isinstance(value, list) else value["backends"]
        for row in rows:
            for name in (*new, "queue_position"):
                row.pop(name, None)
        if isinstance(value, dict):
            del value["queues"], value["waiting_for_backends"]
            for name in new_sums:
                del value["lately"][name]
        route.fulfill(json=value)

    with gateway.http(gateway.key()) as client:
        assert client.post("/api/chat", json=CHAT).status_code == 200
    gateway.audit_rows()
    with page_of(browser) as page:
        page.route("**/admin/v1/overview", without_new)
        page.route("**/admin/v1/audit?*", without_new)
        # Only the first overview is shown.
        page.route("**/admin/v1/events", holding([]))
        enter(page, gateway, admin)
        expect(page.locator('#backends [data-label="Speaks"]').first).to_have_text("–")
        expect(page.locator(".backend").first).to_contain_text("15 min: no calls")
        expect(page.locator("#queues")).to_contain_text("unknown")
        page.click("[data-tab=audit]")
        expect(page.locator('#rows [data-label="Backend"]')).to_have_text("alpha")
