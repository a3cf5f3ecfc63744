"""A real Chromium for the pages, where the machine has one; what goes wrong in a page fails the test that did not expect it."""

import asyncio
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}
# An error box that a visitor sees is as bad as one in the console: there it is told.
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
def chromium_for_all() -> Iterator[Callable[[], AbstractContextManager[Browser]]]:
    """One for many tests, which take it in hand one after the other and leave no page in it.

    Playwright's loop counts as running in this thread from its start on; while no test has the browser, others may run theirs.
    """
    with _chromium() as browser:
        loop = asyncio.get_running_loop()

        @contextmanager
        def in_hand() -> Iterator[Browser]:
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
            yield in_hand
        finally:
            asyncio._set_running_loop(loop)


@contextmanager
def _chromium() -> Iterator[Browser]:
    program = next((found for name in NAMES if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def page_of(
    browser: Browser, width: str = "desktop", scheme: str = "light", *, expecting: Sequence[str] = ()
) -> Iterator[Page]:
    """A page of a fresh visitor.

    Errors, warnings, dialogs and error boxes fail the test, except those in which one of the regular expressions `expecting` is
    found; each of these must be met.
    """
    wide, high = WIDTHS[width]
    context = browser.new_context(viewport={"width": wide, "height": high}, color_scheme=scheme, locale="en-US")  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.add_init_script(BOXES)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}") if said.type in ("error", "warning") else None)
    page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
    try:
        yield page
        # What has happened in the page is heard before an answer of it.
        page.evaluate("0")
    except BaseException as failed:
        failed.add_note(f"said by the page: {wrong}")
        raise
    finally:
        context.close()
    unexpected = [line for line in wrong if not any(re.search(pattern, line) for pattern in expecting)]
    assert unexpected == [], f"the page said what nobody expected: {unexpected}"
    missed = [pattern for pattern in expecting if not any(re.search(pattern, line) for line in wrong)]
    assert missed == [], f"the page did not say {missed}; it said {wrong}"
