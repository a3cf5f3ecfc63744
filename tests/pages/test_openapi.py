"""What the API's document says is what the gateway is: each route, body and sample; and the page that shows it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from playwright.sync_api import Browser, Page, expect

from gateway import endpoints
from gateway.admin.endpoint import AdminRoute
from gateway.auth.key import ADMIN, ADMIN_MODELS
from gateway.core import strict_json
from gateway.dialects import registry
from gateway.pages import samples, static
from gateway.pages.openapi import FOLDER
from tests.conftest import StartGateway
from tests.support.browser import WIDTHS, page_of
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import Memory
from tests.support.fork_server import ForkServer
from tests.support.processes import environment
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
TOKEN = "a-token-of-metrics"
LARGEST_PAGE = 100_000
EVERYTHING = {"DOCS_ENABLED": "true", "DASHBOARD_ENABLED": "true", "PLAYGROUND_ENABLED": "true", "METRICS_TOKEN": TOKEN}
Run = Callable[[str], tuple[int, str]]
MODULES = Path(__file__).parent / "modules.mjs"
# What runs a sample, by its language; it is read from its standard input.
RUNS = {"curl": ["sh"], "Python": [sys.executable, "-"], "JavaScript": ["node", "--input-type=module"]}
# The fake backend has no account and no searches: that it refuses is passed on.
REFUSED = {
    "GET /api/status",
    "POST /api/me",
    "POST /api/signout",
    "POST /api/experimental/web_search",
    "POST /api/experimental/web_fetch",
    "GET /api/experimental/model-recommendations",
}
UNENDING = "GET /admin/v1/events"
SOME_ID = "k5yq2mxa"
SPEECH = "speech.mp3"
SILENT = ("POST /api/", "POST /v1/audio/speech", "HEAD", "DELETE")
# What ends a thing that other samples name.
LAST = ["DELETE /api/delete", "DELETE /admin/v1/keys/{id}"]


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Iterator[RunningGateway]:
    """A server like vLLM has the routes that Ollama lacks."""
    with (
        FakeBackend(models=[MODEL, "alice/llama3.2:latest"], name="ollama") as backend,
        FakeBackend(kind="openai", models=[MODEL], name="vllm") as other,
    ):
        # It unloads what it is asked to; otherwise that would be watched for ten seconds.
        backend.healthy.memory = Memory()
        yield start_gateway(backend, other, **EVERYTHING)


def document_of(gateway: RunningGateway) -> dict[str, Any]:
    with gateway.http() as client:
        found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By `METHOD /path`."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_the_document_is_valid_openapi(gateway: RunningGateway) -> None:
    OpenAPIV31SpecValidator(document_of(gateway)).validate()


def test_the_document_has_every_route_and_no_other(gateway: RunningGateway) -> None:
    found = operations(document_of(gateway))
    assert found.keys() == strict_json.read_loosely((FOLDER / "routes.json").read_bytes()).keys()
    table = endpoints.table(gateway.settings, gateway.components)
    calls = {f"POST {path}" for path in registry.operations(registry.dialects())}
    others = {f"{method} {path}".replace(":path}", "}") for method, path in table if path != "/metrics"}
    assert found.keys() == calls | others | {"GET /metrics"}
    for line in found:
        method, _, path = line.partition(" ")
        with gateway.http() as client:
            where = path.format(id="x", name="x", digest="sha256:" + "0" * 64)
            known = client.request(method, where).status_code
            assert known != 405 and (known != 404 or path == "/metrics"), line


def test_the_document_has_only_enabled_routes(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    found = operations(document_of(start_gateway(alpha, DOCS_ENABLED="true"))).keys()
    assert "GET /docs" in found and not {"GET /dashboard", "GET /playground", "GET /metrics"} & found


def test_bodies_have_the_fields_that_the_gateway_takes(gateway: RunningGateway) -> None:
    document = document_of(gateway)
    schemas, found = document["components"]["schemas"], operations(document)
    table = endpoints.table(gateway.settings, gateway.components)
    for (method, path), route in table.items():
        if isinstance(route, AdminRoute) and route.has_body:
            body = schemas[name_of_body(found[f"{method} {path}"])]
            assert (body["properties"].keys(), body["additionalProperties"]) == (set(route.takes), False)
    for dialect in registry.dialects().values():
        for operation in dialect.operations:
            body = schemas[name_of_body(found[f"POST {operation.path}"])]
            assert body["properties"].keys() <= dialect.known_fields | {"verbose"}, operation.path
            assert "model" in body["required"]
            how = body["properties"].keys() & {"stream", "stream_format"}
            assert how == {"never": set(), "by format": {"stream_format"}}.get(operation.streaming, {"stream"})


def test_calls_that_wait_for_a_backend_have_the_headers_and_errors_of_the_queue(gateway: RunningGateway) -> None:
    document = document_of(gateway)
    found, shared = operations(document), document["components"]["responses"]
    for line, operation in found.items():
        headers = {"X-Queue-Position", "X-Queue-Wait-Ms", "X-Gateway-Backend", "X-Gateway-Chosen"}
        answered = operation["responses"].get("200", {}).get("headers", {}).keys()
        reference = operation["responses"].get("503", {}).get("$ref", "")
        refused = shared[reference.rpartition("/")[2]]["description"] if reference else ""
        takes_class = any(one["name"] == "X-Gateway-Class" for one in operation.get("parameters", ()))
        waits = "`queue_full`" in refused and "`queue_timeout`" in refused
        assert {headers <= answered, takes_class, waits} == {takes_class}, line
    assert {line for line, operation in found.items() if "X-Gateway-Class" in json.dumps(operation)} > {"POST /api/chat"}
    assert "X-Gateway-Class" not in json.dumps(found["POST /api/show"])
    (parameter,) = [one for one in found["POST /api/chat"]["parameters"] if one["name"] == "X-Gateway-Class"]
    sent = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}
    with gateway.http(gateway.key(flags=("show_backend",))) as client:
        for value, status in {**dict.fromkeys(parameter["schema"]["enum"], 200), "other": 400}.items():
            answer = client.post("/api/chat", json=sent, headers={"X-Gateway-Class": value})
            assert answer.status_code == status
            assert ({"x-queue-position", "x-gateway-chosen"} <= answer.headers.keys()) == (status == 200)


def name_of_body(operation: dict[str, Any]) -> str:
    (content,) = operation["requestBody"]["content"].values()
    reference: str = content["schema"]["$ref"]
    return reference.rpartition("/")[2]


@pytest.mark.parametrize("language", RUNS)
@pytest.mark.timeout(240)
def test_every_sample_runs_as_it_is(gateway: RunningGateway, language: str, tmp_path: Path) -> None:
    if shutil.which(RUNS[language][0]) is None or (language == "curl" and shutil.which("curl") is None):
        pytest.skip(f"{language} is not on this machine")
    flags = (ADMIN, ADMIN_MODELS)
    known = {"GATEWAY_KEY": gateway.key(name="ops", flags=flags), "METRICS_TOKEN": TOKEN, **environment({})}
    alice = gateway.key(name="alice")
    with gateway.http(alice) as client:
        client.get("/api/tags", headers={"X-Request-ID": "my-request-1"})
    gateway.audit_rows()
    found = operations(document_of(gateway))
    with RUNNERS[language](known) as run:
        # What uploads a thing comes before what looks for it.
        for line in sorted(found, key=lambda line: (line in LAST, line.startswith("HEAD"))):
            (sample,) = [one["source"] for one in found[line]["x-codeSamples"] if one["label"] == language]
            sample = sample.replace(samples.BASE, gateway.url).replace(SOME_ID, alice.split("_")[1])
            sample = sample.replace(SPEECH, str(tmp_path / SPEECH))
            status, output = begin(language, sample, known) if line == UNENDING else run(sample)
            if line in REFUSED:
                assert status != 0 and "404" in output, (line, output)
            else:
                assert status == 0 and (output or line.startswith(SILENT)), (line, output)
    assert (tmp_path / SPEECH).read_bytes() == b"vllm heard: Good morning"


@contextmanager
def shell(known: dict[str, str]) -> Iterator[Run]:
    def run(sample: str) -> tuple[int, str]:
        # Without it curl is content with any status.
        script = f'curl() {{ command curl --fail-with-body "$@"; }}\n{sample}'
        done = subprocess.run(["sh"], env=known, input=script, capture_output=True, text=True, timeout=30, check=False)
        return done.returncode, done.stdout + (done.stderr if done.returncode else "")

    yield run


@contextmanager
def python(known: dict[str, str]) -> Iterator[Run]:
    with ForkServer("requests", "openai", "ollama") as preloaded:

        def run(sample: str) -> tuple[int, str]:
            done = preloaded.run("", (), Path(), known, stdin=sample)
            return done.returncode, done.stdout + (done.stderr if done.returncode else "")

        yield run


@contextmanager
def node(known: dict[str, str]) -> Iterator[Run]:
    command = ["node", str(MODULES)]
    with subprocess.Popen(command, env=known, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        to_it, from_it = process.stdin, process.stdout

        def run(sample: str) -> tuple[int, str]:
            to_it.write(json.dumps(sample) + "\n")
            to_it.flush()
            status, output, wrong = json.loads(from_it.readline())
            return status, output + wrong

        yield run
        to_it.close()


RUNNERS: dict[str, Callable[[dict[str, str]], AbstractContextManager[Run]]] = {
    "curl": shell,
    "Python": python,
    "JavaScript": node,
}


def begin(language: str, sample: str, known: dict[str, str]) -> tuple[int, str]:
    """Of what does not end: what it says first; then it is stopped."""
    with subprocess.Popen(RUNS[language], env=known, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as started:
        assert started.stdin is not None and started.stdout is not None
        started.stdin.write(sample)
        started.stdin.close()
        output = started.stdout.readline()
        started.kill()
        return (0 if output.startswith("data: {") else 1), output


def test_when_disabled_it_is_an_ordinary_404(start_gateway: StartGateway, alpha: FakeBackend) -> None:
    with start_gateway(alpha).http() as client:
        nowhere = client.get("/nowhere")
        for path in [*endpoints.DOCS, "/openapi.json"]:
            assert (client.get(path).status_code, client.get(path).content) == (404, nowhere.content)


def test_the_page_is_small_and_obeys_the_content_security_policy(gateway: RunningGateway) -> None:
    with gateway.http() as client:
        answers = [client.get(path) for path in endpoints.DOCS]
    assert sum(len(answer.content) for answer in answers) < LARGEST_PAGE
    assert {answer.headers["content-security-policy"] for answer in answers} == {static.POLICY}


def opened(page: Page, gateway: RunningGateway, operation: str) -> Any:
    page.goto(f"{gateway.url}/docs#{operation}")
    return page.locator(f"#{operation}")


def test_the_page_shows_every_operation_and_calls_no_other_host(gateway: RunningGateway, browser: Browser) -> None:
    found = operations(document_of(gateway))
    asked: list[str] = []
    with page_of(browser) as page:
        page.on("request", lambda request: asked.append(request.url))
        line = opened(page, gateway, "post_v1_chat_completions")
        expect(line.locator("pre")).to_contain_text(f"curl {gateway.url}/v1/chat/completions")
        line.get_by_role("button", name="Python").click()
        expect(line.locator("pre")).to_contain_text("client.chat.completions.create")
        assert page.locator(".route").count() == len(found)
        page.locator(".route:not([open]) > summary").first.click()
        # A click by hand takes a tenth of a second.
        page.evaluate("document.querySelectorAll('.route:not([open]) > summary').forEach(line => line.click())")
        expect(page.locator(".route > .operation")).to_have_count(len(found))
        # The language that was chosen is that of all samples.
        assert page.locator("pre", has_text="curl ").count() == 0
        folds = page.locator(".operation details:not([open])").count()
        assert folds > 40
        page.evaluate("document.querySelectorAll('.operation details:not([open]) > summary').forEach(line => line.click())")
        page.wait_for_function(
            f"document.querySelectorAll('.operation details[open] > :last-child:not(summary)').length >= {folds}"
        )
        assert "[object" not in page.inner_text("#document") and "undefined" not in page.inner_text("#document")
        page.fill("#find", "keys rotate")
        expect(page.locator(".route:visible")).to_have_count(1)
        assert all(url.startswith(gateway.url) for url in asked)


def test_the_page_fits_a_phone(gateway: RunningGateway, browser: Browser) -> None:
    for scheme in ("light", "dark"):
        with page_of(browser, "phone", scheme) as page:
            line = opened(page, gateway, "get_admin_v1_audit")
            expect(line.locator("pre")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= WIDTHS["phone"][0]
            if folder := os.environ.get("SCREENSHOTS"):
                page.screenshot(path=Path(folder) / f"docs-phone-{scheme}.png", full_page=True)
