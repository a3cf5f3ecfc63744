"""The playground in a real browser: all that it offers, what servers really say, and nothing that they could do to it."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from gateway import endpoints
from gateway.auth.key import SHOW_BACKEND
from tests.conftest import StartGateway
from tests.support.browser import WIDTHS, page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Step, answer, sse, stream
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
XSS = "<img src=x onerror=alert(1)><script>alert(2)</script>"
CHAT = "/v1/chat/completions"
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)
LARGEST_PAGE = 100_000
LLAMA = os.environ.get("LLAMA_SERVER_URL", "")


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    alpha.healthy.models.append("qwen3:8b")
    return start_gateway(alpha, beta, PLAYGROUND_ENABLED="true")


def chunks(*deltas: dict[str, str], usage: dict[str, int] | None = None) -> list[dict[str, object]]:
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    frames: list[dict[str, object]] = [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    frames.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return [*frames, {**head, "choices": [], "usage": usage or {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}]


def streamed(*deltas: dict[str, str], pause_s: float = 0.0) -> list[Step]:
    return stream(sse(chunks(*deltas)), pause_s=pause_s)


def enter(page: Page, gateway: RunningGateway, key: str) -> None:
    page.goto(f"{gateway.url}/playground")
    page.fill("#key", key)
    page.click("#sign-in button")


def ask(page: Page, words: str) -> None:
    page.fill("#prompt", words)
    page.press("#prompt", "Enter")


def test_when_disabled_it_is_an_ordinary_404(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    gateway = start_gateway(alpha)
    with gateway.http() as client:
        nowhere = client.get("/nowhere")
        for path in endpoints.PLAYGROUND:
            assert (client.get(path).status_code, client.get(path).content) == (404, nowhere.content)


def test_a_playground_of_the_operator(start_gateway: StartGateway, alpha: FakeBackend, tmp_path: Path) -> None:
    own = tmp_path / "own.html"
    own.write_text("<title>Ours</title>")
    gateway = start_gateway(alpha, PLAYGROUND_ENABLED="true", PLAYGROUND_FILE=str(own))
    with gateway.http() as client:
        assert client.get("/playground").text == "<title>Ours</title>"
        assert client.get("/playground/playground.js").status_code == 404


def test_the_content_security_policy_and_the_size(gateway: RunningGateway) -> None:
    total = 0
    with gateway.http() as client:
        for path in endpoints.PLAYGROUND:
            answered = client.get(path)
            assert "unsafe" not in answered.headers["content-security-policy"]
            assert re.findall(r"(?:src|href)=\"(?:https?:)?//", answered.text) == []
            total += len(answered.content)
    assert total < LARGEST_PAGE


def test_a_chat_with_its_details(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    key = gateway.key(rpm=50, flags=(SHOW_BACKEND,))
    words = "# Yes\n\n- **one**\n- `two`\n\n```\ncode <b>\n```\n[a](https://example.org/x)"
    alpha.play_once(CHAT, streamed({"reasoning": "Hmm."}, {"content": words}, pause_s=0.05))
    with page_of(browser) as page:
        enter(page, gateway, key)
        page.locator("summary").first.click()
        page.fill("#system", "Be brief.")
        page.fill("#temperature", "0.5")
        page.fill("#max-tokens", "77")
        page.check("#json")
        ask(page, "Is it so?")
        shown = page.locator(".answer .answer-text")
        expect(shown.locator("h3, h2")).to_have_text("Yes")
        expect(shown.locator("li strong")).to_have_text("one")
        expect(shown.locator("pre code")).to_have_text("code <b>")
        expect(shown.locator("a")).to_have_attribute("rel", "noopener noreferrer")
        thinking = page.locator("details.thinking")
        expect(thinking).to_have_attribute("class", "thinking")
        assert thinking.get_attribute("open") is None and "Hmm." in (thinking.text_content() or "")
        facts = page.locator(".facts")
        for fact in ("backend alpha", "request ", "3 + 5 tokens", "first token", "tokens/s", "47 requests"):
            expect(facts).to_contain_text(fact)
        for way in ("curl", "Python", "JavaScript"):
            expect(page.get_by_role("button", name=f"Copy as {way}")).to_be_visible()
        ask(page, "And then?")
        expect(page.locator(".answer")).to_have_count(2)
        expect(page.locator("#send")).to_be_enabled()
        assert page.evaluate("localStorage.length") == 0
    first, second = (call.json for call in alpha.calls(CHAT))
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (first["temperature"], first["max_tokens"], first["response_format"]) == (0.5, 77, {"type": "json_object"})
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]


def test_stop_edit_and_retry(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    alpha.play_once(CHAT, streamed(*({"content": f"{n} "} for n in range(200)), pause_s=0.05))
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        ask(page, "Count.")
        expect(page.locator(".answer-text")).to_contain_text("3")
        page.click("#stop")
        expect(page.locator(".facts")).to_contain_text("stopped")
        until(lambda: gateway.components.backends["alpha"].in_flight == 0, 5)
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".facts")).not_to_contain_text("stopped")
        expect(page.locator("#send")).to_be_enabled()
        page.get_by_role("button", name="Edit").click()
        expect(page.locator("#prompt")).to_have_value("Count.")
        ask(page, "Count better.")
        expect(page.locator(".question")).to_have_count(1)
        expect(page.locator(".question")).to_contain_text("Count better.")


def test_two_models_side_by_side(gateway: RunningGateway, browser: Browser) -> None:
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        page.select_option("#model", MODEL)
        page.select_option("#compare", "qwen3:8b")
        ask(page, "Who are you?")
        expect(page.locator(".answer h3")).to_have_text([MODEL, "qwen3:8b"])
        expect(page.locator(".facts")).to_have_count(2)
        lefts = [box["x"] for box in (card.bounding_box() for card in page.locator(".answer").all()) if box]
        assert lefts[0] < lefts[1]


def test_images_are_offered_for_models_with_vision(
    gateway: RunningGateway, alpha: FakeBackend, tmp_path: Path, browser: Browser
) -> None:
    picture = tmp_path / "pixel.png"
    picture.write_bytes(PIXEL)
    sees = answer(200, {"capabilities": ["completion", "vision"], "details": {}, "model_info": {}})
    with page_of(browser) as page:
        enter(page, gateway, gateway.key())
        expect(page.locator("#add-image")).not_to_be_visible()
        alpha.play("/api/show", lambda _: sees)
        page.select_option("#model", "qwen3:8b")
        expect(page.locator("#add-image")).to_be_visible()
        page.set_input_files("#image", picture)
        expect(page.locator("#images img")).to_have_count(1)
        ask(page, "What is it?")
        expect(page.locator(".question img")).to_have_count(1)
        expect(page.locator("#send")).to_be_enabled()
    [part] = [part for part in alpha.calls(CHAT)[-1].json["messages"][-1]["content"] if part["type"] == "image_url"]
    assert part["image_url"]["url"].startswith("data:image/png;base64,")


def test_errors_as_the_api_gave_them_and_a_countdown(gateway: RunningGateway, alpha: FakeBackend, browser: Browser) -> None:
    with page_of(browser, expecting=["status of 401", "box: 401", "status of 429", "box: 429: Limit of"]) as page:
        enter(page, gateway, "nz_wrong")
        expect(page.locator("#problem")).to_contain_text("401: The API key is wrong, expired or revoked.")
        enter(page, gateway, gateway.key(concurrent=0))
        ask(page, "Hello")
        expect(page.locator(".answer .bad")).to_contain_text("429: Limit of 0 requests at once for this key reached")
        page.click("#sign-out")
        enter(page, gateway, gateway.key(rpm=4))
        ask(page, "Hello")
        expect(page.locator("#send")).to_be_enabled()
        ask(page, "Hello again")
        expect(page.locator("#send")).to_be_enabled()
        ask(page, "And again")
        expect(page.locator(".countdown")).to_contain_text("retry in")
        expect(page.get_by_role("button", name="Try again")).to_be_disabled()


def test_embeddings(start_gateway: StartGateway, browser: Browser) -> None:
    with FakeBackend(models=["bge:latest"], name="alpha") as alpha:
        gateway = start_gateway(alpha, PLAYGROUND_ENABLED="true")
        with page_of(browser) as page:
            enter(page, gateway, gateway.key())
            page.click("[data-tab=embed]")
            page.fill("#texts", "one\ntwo\none")
            page.click("#embed-form button")
            expect(page.locator("#vectors tbody tr")).to_have_count(3)
            expect(page.locator("#vectors tbody tr").nth(2)).to_contain_text("1.0000")


def test_only_the_models_of_the_key(gateway: RunningGateway, browser: Browser) -> None:
    with page_of(browser) as page:
        enter(page, gateway, gateway.key("qwen*"))
        expect(page.locator("#model option")).to_have_text(["qwen3:8b"])


def test_content_from_servers_is_never_markup(start_gateway: StartGateway, browser: Browser) -> None:
    link = '[x](javascript:alert(3)) [y](https://example.org/"onmouseover=alert(4))'
    with FakeBackend(models=[XSS], name="alpha") as evil:
        gateway = start_gateway(evil, PLAYGROUND_ENABLED="true")
        words = f"{XSS}\n\n# {XSS}\n\n- {XSS}\n\n`{XSS}`\n\n|{XSS}|b|\n|-|-|\n|{XSS}|c|\n\n{link}"
        evil.play_once(CHAT, streamed({"reasoning": XSS}, {"content": words}))
        with page_of(browser, expecting=["status of 400", "box: 400: <img"]) as page:
            asked: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            enter(page, gateway, gateway.key())
            ask(page, XSS)
            expect(page.locator(".answer-text")).to_contain_text("<img")
            expect(page.locator("#send")).to_be_enabled()
            assert page.locator("main img, main script, main [onmouseover], main [onerror]").count() == 0
            addresses = [link.get_attribute("href") or "" for link in page.locator(".answer-text a").all()]
            assert all(address.startswith("https://example.org/") for address in addresses)
            assert {urlsplit(url).netloc for url in asked} == {urlsplit(gateway.url).netloc}
            evil.play_once(CHAT, answer(400, {"error": {"message": XSS, "type": "invalid_request_error"}}))
            ask(page, "again")
            expect(page.locator(".answer .bad")).to_contain_text("400: <img")
            assert page.locator("main img, main script").count() == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut(gateway: RunningGateway, alpha: FakeBackend, width: str, scheme: str, browser: Browser) -> None:
    long = "a" * 400
    table = "|one|two|three|\n|-|-|-|\n|" + "|".join(["words and words and words"] * 3) + "|"
    alpha.play_once(CHAT, streamed({"reasoning": long}, {"content": f"{long}\n\n```\n{long}\n```\n\n{table}"}))
    with page_of(browser, width, scheme) as page:
        enter(page, gateway, gateway.key())
        ask(page, long)
        expect(page.locator(".facts")).to_contain_text("tokens")
        page.locator("details.thinking summary").click()
        too_wide = page.evaluate(
            "[...document.querySelectorAll('main:not([hidden]) *, header *')].filter((node) => node.checkVisibility() && "
            "node.getBoundingClientRect().right > innerWidth + 1).map((node) => node.outerHTML.slice(0, 90))"
        )
        assert too_wide == []


@pytest.mark.skipif(not LLAMA, reason="LLAMA_SERVER_URL names no llama.cpp server")
def test_against_a_real_llama_cpp_server(start_gateway: StartGateway, browser: Browser) -> None:
    entry = {"name": "llama", "base_url": LLAMA, "kind": "openai"}
    gateway = start_gateway(entry, PLAYGROUND_ENABLED="true", OLLAMA_READ_TIMEOUT_S="20")
    with page_of(browser) as page:
        enter(page, gateway, gateway.key(flags=(SHOW_BACKEND,)))
        page.fill("#max-tokens", "12")
        ask(page, "Hello")
        expect(page.locator(".facts")).to_contain_text("12 tokens", timeout=30_000)
        expect(page.locator(".facts")).to_contain_text("backend llama")
