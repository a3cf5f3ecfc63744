"""A real Chromium for the pages, where the machine has one; an unexpected error in a page fails its test."""

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Chromium would load two pages for its address bar with each window, which take more time than the pages under test.
ADDRESS_BAR_PAGES = ("WebUIOmniboxPopup", "WebUIOmniboxAimPopup")
# Features that Playwright disables: a second list replaces its own.
ALSO_DISABLED = (
    "AvoidUnnecessaryBeforeUnloadCheckSync",
    "DestroyProfileOnBrowserClose",
    "HttpsUpgrades",
    "HttpsFirstBalancedModeAutoEnable",
    "LensOverlay",
    "MediaRouter",
    "PaintHolding",
    "ThirdPartyStoragePartitioning",
    "Translate",
    "AvoidCorsURLLoaderRestartOnRedirect",
    "OptimizationHints",
    "NetworkTimeServiceQuerying",
    "AimEnabled",
    "PreconnectToSearch",
    "SpareRendererForSitePerProcess",
)
DISABLED = ",".join((*ADDRESS_BAR_PAGES, *ALSO_DISABLED))
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
# A visible error box counts as an error: it is written to the console.
BOXES = """
const shown = new WeakMap();
new MutationObserver(() => {
  for (const box of document.querySelectorAll('[role=alert]')) {
    const words = box.checkVisibility() ? box.textContent : '';
    if (words && shown.get(box) !== words) console.error(`error box: ${words}`);
    shown.set(box, words);
  }
}).observe(document, { subtree: true, childList: true, characterData: true, attributes: true });
"""


@contextmanager
def shared_chromium() -> Iterator[Callable[[], AbstractContextManager[Browser]]]:
    """One browser for many tests. Each takes it for a while; its pages are closed afterwards.

    Playwright's event loop counts as running in this thread from its start; it is hidden while no test has the browser,
    so that other tests can run their own.
    """
    with _chromium() as browser:
        loop = asyncio.get_running_loop()

        @contextmanager
        def take() -> Iterator[Browser]:
            asyncio._set_running_loop(loop)
            try:
                yield browser
                assert browser.is_connected(), "the browser has ended"
            finally:
                for context in browser.contexts:
                    context.close()
                asyncio._set_running_loop(None)

        asyncio._set_running_loop(None)
        try:
            yield take
        finally:
            asyncio._set_running_loop(loop)


@contextmanager
def _chromium() -> Iterator[Browser]:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: chromium)")
    with sync_playwright() as playwright:
        switches = ["--no-sandbox", "--disable-gpu", f"--disable-features={DISABLED}"]
        browser = playwright.chromium.launch(executable_path=program, args=switches)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(
    browser: Browser, width: str = "desktop", scheme: str = "light", *, expecting: Sequence[str] = ()
) -> Iterator[Page]:
    """A page of a fresh visitor.

    Errors, warnings, dialogs and error boxes fail the test unless one of the regular expressions in `expecting` matches; each
    of these must match at least once.
    """
    wide, high = WIDTHS[width]
    context = browser.new_context(viewport={"width": wide, "height": high}, color_scheme=scheme, locale="en-US")  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.add_init_script(BOXES)
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on(
        "console",
        lambda message: problems.append(f"{message.type}: {message.text}") if message.type in ("error", "warning") else None,
    )
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    try:
        yield page
        # Events of the page arrive before the answer to this.
        page.evaluate("0")
    except BaseException as failed:
        failed.add_note(f"reported by the page: {problems}")
        raise
    finally:
        context.close()
    unexpected = [line for line in problems if not any(re.search(pattern, line) for pattern in expecting)]
    assert unexpected == [], f"unexpected reports of the page: {unexpected}"
    missed = [pattern for pattern in expecting if not any(re.search(pattern, line) for line in problems)]
    assert missed == [], f"the page did not report {missed}; it reported {problems}"
