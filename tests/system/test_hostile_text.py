"""The work on any text from callers, operators and backends grows at most linearly with its length; caches stay bounded."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from gateway.admin import values
from gateway.audit import prompt_log, reports
from gateway.auth import key_format
from gateway.auth.key import ADMIN
from gateway.core import strict_json
from gateway.core.errors import BadRequest
from gateway.dialects import model_entries
from gateway.dialects.dialect import read_call
from gateway.dialects.model_names import LONGEST_NAME, REMEMBERED_NAMES, AllowList, canonical
from gateway.dialects.ollama import Ndjson, Ollama
from gateway.dialects.openai import OpenAI, ServerSentEvents
from gateway.edge import application
from gateway.edge.client_address import TrustedProxies, _address
from gateway.fleet import catalog
from gateway.fleet.backends.config import BackendConfig
from gateway.fleet.catalog import Snapshot
from gateway.fleet.redaction import redact
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

LONG = 60_000
PROXIES = TrustedProxies(["10.0.0.0/8"])
OPENAI = OpenAI()
ALPHA = BackendConfig("alpha", "http://alpha", auth_token="token")


def quietly(work: Callable[[Any], object]) -> Callable[[Any], object]:
    """The same function, ignoring refusals."""

    def try_it(text: Any) -> None:
        with suppress(Exception):
            work(text)

    return try_it


def forwarded(text: str) -> object:
    return PROXIES.client_of({"client": ("10.0.0.1", 1), "headers": [(b"x-forwarded-for", text.encode())]})


def redacted(text: str) -> object:
    return redact(text, ALPHA)


def events(text: str) -> object:
    return OPENAI.without_usage(text.encode())


# Functions that process texts of others, with texts that would cause backtracking in a careless expression.
WORK: list[tuple[str, Callable[[Any], object], str]] = [
    ("a name", canonical, "a"),
    ("schemes", canonical, "a://"),
    ("suffixes", canonical, ":local"),
    ("an allow-list", AllowList(("*a*a*a*a*b", "*" + "?*" * 100 + "b", "[a-c]*[!x]*y")).allows, "a"),
    ("its tags", AllowList(("*:*:*:*:*b",)).allows, "a:"),
    ("a glob of an operator", lambda text: AllowList((text,)), "*a"),
    ("sets of a glob", lambda text: AllowList((text,)), "[a"),
    ("a filter", lambda text: values.model_filter(text[:1000]), "*%"),
    ("a duration", values.since, "1"),
    ("a moment", values.since, "2026-01-01T00:00:00.1"),
    ("a status", values.status, "4x"),
    ("groups", values.groups, "key,"),
    ("a request's id", reports.uuid_of, "urn:uuid:"),
    ("a key", key_format.parse, "_"),
    ("keys in words", key_format.redacted, "nz_aaaaaaaa_"),
    ("one key in words", key_format.redacted, "nz_aaaaaaaa_a"),
    ("a header's key", lambda text: key_format.find([(b"authorization", f"Basic {text}".encode())], None), "YWJj"),
    ("a path", application.KEY_IN_PATH.fullmatch, "/k/"),
    ("an id", lambda text: application.WELL_FORMED_ID.fullmatch(text.encode()), "a"),
    ("proxies", forwarded, "10.0.0.2,"),
    ("an address", _address, "1:"),
    ("a zone", _address, "fe80::1%"),
    ("a backend's words", redacted, "bearer "),
    ("blanks in them", lambda text: redacted("bearer" + text), " "),
    ("blobs", prompt_log.without_blobs, "a"),
    ("events", lambda text: ServerSentEvents().payloads(text.encode()), "data: \r\r\n"),
    ("lines", lambda text: Ndjson().payloads(text.encode()), " \n"),
    ("usage", events, '"usage" : null '),
    ("usage in events", events, 'data: {"usage":null,"choices":\n\n'),
    ("ends of events", events, '"usage"\r\r\n\r'),
    ("the text of an answer", lambda text: Ollama().answer_text(text.encode()), "{}\n"),
    ("JSON", lambda text: strict_json.read_object(text.encode()), '{"a":'),
    ("a number", lambda text: strict_json.read_object(b'{"a":%b}' % text.encode()), "1"),
    ("a fraction", lambda text: strict_json.read_object(b'{"a":0.%be-9}' % text.encode()), "1"),
    ("letters as numbers", lambda text: strict_json.read_object(b'{"a":"%b"}' % text.encode()), "\\u0061"),
]


def seconds(work: Callable[[Any], object], text: str) -> float:
    """Processor time of this thread, which does not depend on the load of the machine."""
    found = []
    for _ in range(3):
        began = time.thread_time()
        work(text)
        found.append(time.thread_time() - began)
    return min(found)


@pytest.mark.parametrize(("work", "piece"), [case[1:] for case in WORK], ids=[case[0] for case in WORK])
def test_twice_the_text_takes_about_twice_the_work(work: Callable[[Any], object], piece: str) -> None:
    tried, text = quietly(work), piece * (LONG // len(piece))
    # Quadratic work on this length takes far longer; less than this is noise.
    least = 0.02
    for attempt in range(3):
        once, twice = seconds(tried, text), seconds(tried, text * 2)
        if twice < max(least, 3 * once):
            break
        # Another process may have used the processor.
        time.sleep(0.05 * attempt)
    else:
        pytest.fail(f"{once * 1000:.1f} ms for {len(text)} letters, {twice * 1000:.1f} ms for twice as many")
    assert once < 0.5, "linear, but too slow"


def test_caches_are_bounded() -> None:
    for length in (LONGEST_NAME + 1, LONG):
        with pytest.raises(ValueError, match="at most 350"):
            canonical("x" * length)
    for number in range(REMEMBERED_NAMES + 50):
        canonical(f"{number}".ljust(LONGEST_NAME, "x"))
        _address.cache_clear()
        forwarded(f"{number}".ljust(LONG, "x"))
    assert canonical.cache_info().currsize == REMEMBERED_NAMES
    assert _address.cache_info().currsize == 1, "only the peer's"


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ("fe80::1%eth0\x1b[31m", "fe80::1"),
        ("6.6.6.6" + ", 10.0.0.2" * 20, "6.6.6.6"),
        ("6.6.6.6" + ", 10.0.0.2" * 200, "10.0.0.2"),
        ("203.0.113.9, " + "9" * 5000, "10.0.0.1"),
    ],
    ids=["a zone", "some proxies", "too many proxies", "no address"],
)
def test_addresses_of_proxies_are_bounded(chain: str, client: str) -> None:
    assert forwarded(chain) == client


def test_overlong_patterns_of_an_allow_list_match_nothing() -> None:
    endless = AllowList(("a" * LONG, "a*" * LONG))
    assert not endless.allows("a:latest") and not endless.allows("a:cloud", cloud=True)
    assert AllowList(("a*" * LONG, "b")).allows("b:latest")


@pytest.mark.parametrize("field", ["name", "model"])
def test_overlong_names_of_a_backend_are_left_out(field: str) -> None:
    names = ["good:latest", "x" * LONG, "", " ", "two\nlines", 5, None]
    read = model_entries.read_tags({"models": [{field: name} for name in names]})
    assert [entry["name"] for entry in read] == ["good:latest"]
    read = model_entries.read_openai_models({"data": [{"id": name} for name in names]})
    snapshot = Snapshot("alpha", "http://alpha", "openai", time.time(), models=read)
    assert list(catalog.build([snapshot], 60).models) == ["good:latest"]


# ── through a gateway ──

ROUTES = [
    ("GET", "/v1/models/{}", None, 400),
    ("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, 400),
    ("POST", "/api/show", {}, 400),
    ("POST", "/api/pull", {}, 400),
    ("GET", "/admin/v1/explain?key=somebody&model={}", None, 400),
    ("GET", "/admin/v1/explain?key={}&model=a", None, 400),
    ("GET", "/admin/v1/audit?model={}", None, 400),
    ("GET", "/admin/v1/audit?key={}", None, 400),
    ("GET", "/admin/v1/audit?{}=1", None, 400),
    ("GET", "/admin/v1/audit?" + "&a=1" * 60, None, 400),
    ("GET", "/admin/v1/usage?since={}", None, 400),
    ("GET", "/admin/v1/requests/{}", None, 400),
    ("PATCH", "/admin/v1/keys/{}", {"rpm": 1}, 400),
    ("DELETE", "/admin/v1/keys/{}", None, 400),
    ("POST", "/admin/v1/backends/{}/probe", None, 400),
    ("POST", "/admin/v1/keys", {"name": "n", "models": ["x" * LONGEST_NAME + "*"]}, 400),
    ("POST", "/admin/v1/keys", {"name": "n", "models": [f"m{number}" for number in range(101)]}, 400),
    ("GET", "/k/{}/api/tags", None, 200),
    ("GET", "/{}", None, 404),
]


def long_one(client: httpx.Client, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
    text = "a" * LONG
    asked = None if body is None else {"model": text, **body} if "admin" not in path else body
    return client.request(method, path.replace("{}", text), json=asked)


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, TRUSTED_PROXIES="127.0.0.1")


def test_names_are_bounded_on_every_route(gateway: RunningGateway) -> None:
    """While they are refused, other requests are answered without delay."""
    slowest, ended = [0.0], threading.Event()

    def check_health() -> None:
        with gateway.http() as client:
            while not ended.is_set():
                began = time.perf_counter()
                assert client.get("/healthz").status_code == 200
                slowest.append(time.perf_counter() - began)

    checking = threading.Thread(target=check_health)
    checking.start()
    try:
        with gateway.http(gateway.key(flags=(ADMIN, "admin_models"), rpm=10_000)) as client:
            for method, path, body, status in ROUTES:
                answered = long_one(client, method, path, body)
                assert answered.status_code == status, (path, answered.text[:200])
                assert "a" * 1001 not in answered.text, f"{path} repeats the input"
            headers = {"X-Request-ID": "a" * LONG}
            assert len(client.get("/api/tags", headers=headers).headers["x-request-id"]) == 32
            assert client.get("/api/tags", headers={"User-Agent": "a" * LONG}).status_code == 200
            assert client.get("/api/tags", headers={"X-Forwarded-For": "10.0.0.1," * (LONG // 9)}).status_code == 200
    finally:
        ended.set()
        checking.join()
    assert len(slowest) > 5 and max(slowest) < 2.0
    assert max(len(row["agent"]) for row in gateway.audit_rows()) == 200


def test_an_overlong_name_reveals_nothing_about_models(gateway: RunningGateway) -> None:
    known, unknown = quote("llama3.2".ljust(LONGEST_NAME + 1)), "x" * (LONGEST_NAME + 1)
    with gateway.http(gateway.key("llama3.2")) as client:
        answers = [client.get(f"/v1/models/{name}") for name in (known, unknown)]
        assert answers[0].content == answers[1].content and answers[0].status_code == 400
        assert "at most 350 printable characters" in answers[0].json()["error"]["message"]
        assert client.get("/v1/models/" + "x" * LONGEST_NAME).status_code == 403
    assert re.search("a{400}", str(gateway.request_lines())) is None


@pytest.mark.parametrize("wrong", ["", " ", "a\nb", "x" * 351])
def test_invalid_names_are_reported(wrong: str) -> None:
    with pytest.raises(BadRequest, match="'model'"):
        read_call(OPENAI, OPENAI.operations[0], strict_json.write({"model": wrong, "messages": []}))
