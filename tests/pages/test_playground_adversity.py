"""The playground against odd answers and hasty hands: it never hangs, loses nothing, and stays where the user is."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.conftest import StartGateway
from tests.pages.test_playground import CHAT, MODEL, PIXEL, ask, chunks, enter, streamed
from tests.support.browser import page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Step, answer, sse, stream
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

STORMS = {
    "quotes": ">" * 10_000,
    "emphasis": "*a " * 22_000,
    "brackets": "[" * 60_000,
    "links": "[a](http://" * 6_000,
    "ticks": "".join("`" * (n % 90 + 1) + " " for n in range(1_500)),
    "tables": "|a|b|\n|-|-|\n" * 5_000,
    "lists": "- " * 20_000 + "a",
    "nested lists": "\n".join("  " * n + "- a" for n in range(300)),
}
BEAT = (
    "window.worst = 0; let last = performance.now(); setInterval(() => { const now = performance.now();"
    " window.worst = Math.max(window.worst, now - last); last = now; }, 10)"
)


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, beta, PLAYGROUND_ENABLED="true")


def in_pieces(text: str, size: int, pause_s: float = 0.0) -> list[Step]:
    return streamed(*({"content": text[at : at + size]} for at in range(0, len(text), size)), pause_s=pause_s)


def is_done(page: Page) -> None:
    expect(page.locator("#send")).to_be_enabled(timeout=30_000)
    expect(page.locator(".answer").last).not_to_have_attribute("aria-busy", "true")


def test_no_text_of_a_model_freezes_the_page(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    """Measured against plain words of the same length in the same page: the machine's speed cancels out."""
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        page.evaluate(BEAT)
        worst: dict[str, float] = {}
        for name, text in {"plain": "some plain words. " * 4_000, **STORMS}.items():
            page.click("#new-chat")
            alpha.play_once(CHAT, in_pieces(text, 8_000))
            page.evaluate("window.worst = 0")
            ask(page, name)
            is_done(page)
            expect(page.locator(".answer-text")).not_to_be_empty()
            worst[name] = page.evaluate("window.worst")
        floor = max(worst.pop("plain"), 50)
        assert {name: ms for name, ms in worst.items() if ms > 40 * floor} == {}, (floor, worst)


def test_deeply_nested_text_is_shown_completely(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        alpha.play_once(CHAT, in_pieces(">" * 10_000 + " the end", 5_000))
        ask(page, "deep")
        is_done(page)
        expect(page.locator(".answer-text")).to_contain_text("the end")


def test_a_done_marker_inside_the_text_is_text(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    alpha.play_once(CHAT, streamed({"content": "data: [DONE]\n\n"}, {"content": "[DONE]"}, {"content": " and more"}))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        ask(page, "What ends a stream?")
        is_done(page)
        expect(page.locator(".answer-text")).to_contain_text("[DONE] and more")


def test_nothing_else_starts_while_an_answer_runs(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    alpha.play_once(CHAT, in_pieces("x" * 400, 1, pause_s=0.05))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        ask(page, "Count.")
        expect(page.locator(".answer-text")).to_contain_text("xx")
        assert page.get_by_role("button", name="Edit").count() == page.get_by_role("button", name="Retry").count() == 0
        page.fill("#prompt", "too early")
        page.press("#prompt", "Enter")
        expect(page.locator("#prompt")).to_have_value("too early")
        page.click("#stop")
        is_done(page)
        until(lambda: gateway.components.backends["alpha"].in_flight == 0, 5)
        assert len(alpha.calls(CHAT)) == 1
        expect(page.get_by_role("button", name="Retry")).to_be_visible()


def test_new_chat_ends_a_running_answer(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    alpha.play_once(CHAT, in_pieces("x" * 400, 1, pause_s=0.05))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        ask(page, "Count.")
        expect(page.locator(".answer-text")).to_contain_text("xx")
        page.click("#new-chat")
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.locator("#send")).to_be_enabled()
        until(lambda: gateway.components.backends["alpha"].in_flight == 0, 5)
        ask(page, "Hello")
        is_done(page)
        expect(page.locator(".turn")).to_have_count(1)


def test_selection_and_scrolling_stay_while_an_answer_grows(
    gateway: RunningGateway, alpha: FakeBackend, browser: Browser
) -> None:
    code = "```\n" + "\n".join(f"line {n}" for n in range(200)) + "\n```\n\nfirst words here\n\n"
    alpha.play_once(CHAT, streamed({"content": code}, *({"content": f"more {n} "} for n in range(60)), pause_s=0.05))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        ask(page, "Code, please.")
        expect(page.locator(".answer-text")).to_contain_text("more 2 ")
        page.evaluate("document.querySelector('.answer-text pre').scrollTop = 120")
        page.evaluate("getSelection().selectAllChildren(document.querySelector('.answer-text p'))")
        expect(page.locator(".answer-text")).to_contain_text("more 25 ")
        assert page.evaluate("getSelection().toString()").strip() == "first words here"
        assert page.evaluate("document.querySelector('.answer-text pre').scrollTop") == 120
        page.click("#stop")


def test_the_focus_stays_where_the_user_types(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    alpha.play_once(CHAT, in_pieces("x" * 30, 1, pause_s=0.05))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        page.locator("summary").first.click()
        ask(page, "Go")
        page.click("#system")
        page.keyboard.type("Be kind, and take your time.", delay=40)
        is_done(page)
        page.keyboard.type("!")
        expect(page.locator("#system")).to_have_value("Be kind, and take your time.!")
        alpha.play_once(CHAT, in_pieces("x" * 400, 1, pause_s=0.05))
        page.get_by_role("button", name="Retry").press("Enter")
        expect(page.locator("#stop")).to_be_focused()
        page.keyboard.press("Enter")
        is_done(page)
        expect(page.locator("#prompt")).to_be_focused()


def test_a_countdown_ends_at_the_time_of_the_gateway(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    """It is the time of the answer that counts, not when it was last drawn."""
    body = {"error": {"message": "Slow down.", "type": "rate_limit_error"}}
    with page_of(browser, expecting=["status of 429", "box: 429: Slow down.$"]) as page:
        enter(page, gateway, gateway.key())
        page.route(f"**{CHAT}", lambda route: route.fulfill(status=429, json=body, headers={"Retry-After": "3"}), times=1)
        began = time.monotonic()
        ask(page, "Hello")
        again = page.get_by_role("button", name="Try again")
        expect(again).to_be_disabled()
        page.wait_for_timeout(1_500)
        ask(page, "Something else")
        expect(page.locator(".answer")).to_have_count(2)
        expect(again).to_be_enabled(timeout=15_000)
        assert time.monotonic() - began < 6
        again.click()
        expect(page.locator(".turn")).to_have_count(1)
        is_done(page)
        expect(page.locator(".answer .bad")).to_have_count(0)


def test_signing_out_removes_everything(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        page.locator("summary").first.click()
        page.fill("#system", "my system words")
        ask(page, "my prompt words")
        is_done(page)
        page.fill("#prompt", "my next words")
        page.click("[data-tab=embed]")
        page.fill("#texts", "my embedded words")
        page.click("#sign-out")
        held = "document.documentElement.outerHTML + [...document.querySelectorAll('input, textarea')].map((one) => one.value)"
        assert "my " not in str(page.evaluate(held))
        assert page.evaluate("sessionStorage.length + localStorage.length") == 0


def test_an_image_is_sent_to_models_with_vision_only_and_can_be_removed(
    gateway: RunningGateway, alpha: FakeBackend, tmp_path: Path, browser: Browser
) -> None:
    picture, words = tmp_path / "pixel.png", tmp_path / "words.txt"
    picture.write_bytes(PIXEL)
    words.write_text("no picture")
    see = answer(200, {"capabilities": ["completion", "vision"], "details": {}, "model_info": {}})
    blind = answer(200, {"capabilities": ["completion"], "details": {}, "model_info": {}})
    alpha.play("/api/show", lambda asked: see if asked.json["model"] == MODEL else blind)
    alpha.healthy.models.append("qwen3:8b")
    with page_of(browser, expecting=["box: words.txt is not an image"]) as page:
        gateway.call(gateway.components.discovery.refresh())
        enter(page, gateway, gateway.key())
        page.select_option("#model", MODEL)
        page.select_option("#compare", "qwen3:8b")
        page.set_input_files("#image", words)
        expect(page.locator("#problem")).to_contain_text("words.txt is not an image")
        page.set_input_files("#image", picture)
        page.get_by_role("button", name="Remove").click()
        expect(page.locator("#images img")).to_have_count(0)
        page.set_input_files("#image", picture)
        ask(page, "What is it?")
        is_done(page)
        expect(page.get_by_text("sent without the image: this model does not accept images")).to_have_count(1)
    sent = {call.json["model"]: call.json["messages"][-1]["content"] for call in alpha.calls(CHAT)}
    assert isinstance(sent[MODEL], list) and sent["qwen3:8b"] == "What is it?"


def test_an_error_shows_its_request_id(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    with page_of(browser, expecting=["status of 400", "box: 400: Too warm."]) as page:
        enter(page, gateway, gateway.key())
        alpha.play_once(CHAT, answer(400, {"error": {"message": "Too warm.", "type": "invalid_request_error"}}))
        with page.expect_response(f"**{CHAT}") as response:
            ask(page, "Hello")
        is_done(page)
        expect(page.locator(".answer .bad")).to_have_text("400: Too warm.")
        expect(page.locator(".facts")).to_contain_text(f"request {response.value.headers['x-request-id']}")


def test_details_show_only_what_is_known(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    frames = [*chunks({"content": "one"})[:-1], {"choices": [], "usage": {"prompt_tokens": 3}}]
    alpha.play_once(CHAT, stream(sse(frames)))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        ask(page, "Hello")
        is_done(page)
        expect(page.locator(".facts")).to_contain_text("3 + ? tokens")
        assert "tokens/s" not in page.locator(".facts").inner_text()
        alpha.play_once(CHAT, streamed({"content": "all in one piece"}))
        ask(page, "Hello")
        is_done(page)
        facts = page.locator(".facts").last.inner_text()
        assert "3 + 5 tokens" in facts and "tokens/s" not in facts and "Infinity" not in facts


def test_the_copied_curl_command_runs_with_a_large_image(
    gateway: RunningGateway, alpha: FakeBackend, tmp_path: Path, browser: Browser
) -> None:
    """A shell takes 128 KiB in one word: the body must not be one."""
    picture = tmp_path / "large.png"
    picture.write_bytes(PIXEL + b"'\"$`\n" * 30_000)
    alpha.play("/api/show", lambda _: answer(200, {"capabilities": ["vision"], "details": {}, "model_info": {}}))
    key = gateway.key()
    with page_of(browser) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.url)
        enter(page, gateway, key)
        page.set_input_files("#image", picture)
        ask(page, "It's a 'quoted' $word `and` more\nEND\n")
        is_done(page)
        page.get_by_role("button", name="Copy as curl").click()
        command = str(page.evaluate("navigator.clipboard.readText()"))
    script = tmp_path / "pasted"
    script.write_text(command)
    done = subprocess.run(
        ["sh", script], check=True, env={"KEY": key, "PATH": "/usr/bin:/bin"}, capture_output=True, timeout=20
    )
    assert b"[DONE]" in done.stdout, done.stderr[-300:]
    first, second = (call.json for call in alpha.calls(CHAT)[-2:])
    assert first == second and len(command) > 150_000


@pytest.mark.parametrize(
    ("api", "path"),
    [("OpenAI chat", CHAT), ("OpenAI Responses", "/v1/responses"), ("Anthropic Messages", "/v1/messages")],
)
def test_copied_calls_run_in_each_api(
    gateway: RunningGateway, alpha: FakeBackend, tmp_path: Path, browser: Browser, api: str, path: str
) -> None:
    """They ask the model for the same: backends that do not have the API get the body that the page sent."""
    picture = tmp_path / "pixel.png"
    picture.write_bytes(PIXEL)
    alpha.play("/api/show", lambda _: answer(200, {"capabilities": ["vision"], "details": {}, "model_info": {}}))
    key = gateway.key()
    with page_of(browser) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=gateway.url)
        enter(page, gateway, key)
        page.locator("summary").first.click()
        page.fill("#system", "Be 'brief'.")
        page.fill("#temperature", "0.5")
        page.fill("#max-tokens", "77")
        page.check("#json")
        ask(page, "First")
        is_done(page)
        page.set_input_files("#image", picture)
        ask(page, "It's a 'quoted' $word `and` \\n more")
        expect(page.locator(".facts")).to_have_count(2)
        is_done(page)
        last = page.locator(".answer").last
        last.get_by_label("API of the copied call").select_option(api)
        copied = {}
        for way in ("curl", "Python", "JavaScript"):
            last.get_by_role("button", name=f"Copy as {way}").click()
            copied[way] = str(page.evaluate("navigator.clipboard.readText()"))
        sent = alpha.calls(CHAT)[-1].json
        in_page = copied["JavaScript"].replace("process.env.KEY", json.dumps(key))
        in_page = in_page.replace("process.stdout.write(piece)", "all += piece")
        streamed_text = page.evaluate(f"async () => {{ let all = ''; {in_page} return all; }}")
    for way, command in (("curl", ["sh"]), ("Python", [sys.executable])):
        (tmp_path / way).write_text(copied[way])
        names = {"KEY": key, "PATH": "/usr/bin:/bin"}
        done = subprocess.run([*command, tmp_path / way], env=names, capture_output=True, timeout=30, check=False)
        assert done.returncode == 0 and done.stdout, done.stderr[-600:]
    assert {"OpenAI chat": "[DONE]", "OpenAI Responses": "response.completed", "Anthropic Messages": "message_stop"}[
        api
    ] in streamed_text
    rows = gateway.audit_rows()[-3:]
    assert [(row["route"], row["status"], row["dropped"]) for row in rows] == [(path, 200, None)] * 3
    # Translations ask Ollama for JSON by a schema that takes any object.
    form = "json_object" if path == CHAT else "json_schema"
    for call in alpha.calls(CHAT)[-3:]:
        assert call.json["response_format"]["type"] == form
        assert comparable(call.json) == comparable(sent)


def comparable(body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "messages": plain(body["messages"]), "response_format": None}


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A text alone is the same as a list of one text."""

    def parts(content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    return [{**message, "content": parts(message["content"])} for message in messages]


def test_a_key_with_characters_that_no_header_can_carry(gateway: RunningGateway, browser: Browser) -> None:
    with page_of(browser, expecting=["box: This is not a key"]) as page:
        enter(page, gateway, "ключ")
        expect(page.locator("#problem")).to_contain_text("This is not a key")


MARKDOWN = {
    "a_b_c and 2 * 3 * 4": "<p>a_b_c and 2 * 3 * 4</p>",
    "***both***": "<p><strong><em>both</em></strong></p>",
    "1. one\n2. two\n   - in\n": '<ol start="1"><li>one</li><li>two<ul><li>in</li></ul></li></ol>',
    "`a **b**`": "<p><code>a **b**</code></p>",
    "~~~\n# no heading\n~~~": '<pre tabindex="0"><code># no heading</code></pre>',
    "\\*not\\*": "<p>*not*</p>",
    "> a\n> b": "<blockquote><p>a<br>b</p></blockquote>",
    "#hashtag": "<p>#hashtag</p>",
    "[x](ftp://a)": "<p>[x](ftp://a)</p>",
}  # fmt: skip


def test_markdown_as_models_write_it(gateway: RunningGateway, browser: Browser) -> None:
    made = """async (words) => {
      const { StreamingMarkdown } = await import('/playground/markdown.js');
      const grown = document.createElement('div'), once = document.createElement('div'), growing = new StreamingMarkdown(grown);
      for (let n = 1; n <= words.length; n += 1) growing.show(words.slice(0, n));
      new StreamingMarkdown(once).show(words);
      return [grown.innerHTML, once.innerHTML];
    }"""
    with page_of(browser) as page:
        page.goto(f"{gateway.url}/playground")
        for words, expected in MARKDOWN.items():
            grown, at_once = page.evaluate(made, words)
            assert grown == at_once == expected, words
