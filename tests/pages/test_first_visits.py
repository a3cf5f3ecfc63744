"""Every page as people first meet it: by any address, without a key, with an old one, and beside a gateway that is away."""

import pytest
from playwright.sync_api import Browser, Page, expect

from gateway.auth.key import ADMIN
from tests.conftest import StartGateway
from tests.support.browser import page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

FRAGMENTS = ("", "#", "#%", "#1", "#<img src=x onerror=alert(1)>", "#problem", "#get_v1_models")
# Of each page: what a visitor sees first.
FIRST = {"/docs": ".route", "/dashboard": "#sign-in", "/playground": "#sign-in"}
KEPT = {"/dashboard": "gateway-key", "/playground": "playground-key"}
INSIDE = {"/dashboard": "#backends tbody tr", "/playground": "#model option"}


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, DASHBOARD_ENABLED="true", PLAYGROUND_ENABLED="true", DOCS_ENABLED="true")


def keep(page: Page, path: str, key: str) -> None:
    """As if the key had been given in this tab before."""
    page.add_init_script(f"sessionStorage.setItem({KEPT[path]!r}, {key!r})")


@pytest.mark.parametrize("path", FIRST)
def test_the_first_visit_with_any_fragment(gateway: RunningGateway, path: str, browser: Browser) -> None:
    with page_of(browser) as page:
        for fragment in FRAGMENTS:
            # Otherwise the browser would go to another fragment of the same page.
            page.goto("about:blank")
            page.goto(f"{gateway.url}{path}{fragment}")
            expect(page.locator(FIRST[path]).first).to_be_visible()
            expect(page.locator("[role=alert]:visible")).to_have_count(0)


def test_the_first_visit_with_a_stored_key(gateway: RunningGateway, browser: Browser) -> None:
    good, user = gateway.key(flags=(ADMIN,)), gateway.key()
    for path in KEPT:
        with page_of(browser) as page:
            keep(page, path, good)
            page.goto(f"{gateway.url}{path}")
            expect(page.locator(INSIDE[path]).first).to_be_attached()
        with page_of(
            browser, expecting=["the server responded with a status of 401", "error box: 401: The API key is"]
        ) as page:
            keep(page, path, "nz_forgotten")
            page.goto(f"{gateway.url}{path}")
            expect(page.locator("#problem")).to_be_visible()
            expect(page.locator("#sign-in")).to_be_visible()
    with page_of(browser, expecting=["status of 403", "error box: 403: this needs a key with the role admin"]) as page:
        keep(page, "/dashboard", user)
        page.goto(f"{gateway.url}/dashboard")
        expect(page.locator("#sign-in")).to_be_visible()


@pytest.mark.parametrize("path", FIRST)
def test_the_first_visit_while_the_gateway_is_down(gateway: RunningGateway, path: str, browser: Browser) -> None:
    """The page has come, what it asks for does not: it says so in words."""
    key = gateway.key(flags=(ADMIN,))
    with page_of(browser, expecting=["net::ERR_CONNECTION_REFUSED", "error box: .*the gateway does not answer"]) as page:
        for asked in ("**/openapi.json", "**/v1/**"):
            page.route(asked, lambda route: route.abort("connectionrefused"))
        if path in KEPT:
            keep(page, path, key)
        page.goto(f"{gateway.url}{path}")
        expect(page.locator("#problem")).to_be_visible()
