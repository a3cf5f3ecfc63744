"""How a request reached a backend that does not speak its dialect: shown to operators, and to keys with that right."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from gateway.auth.key import ADMIN, SHOW_BACKEND
from tests.conftest import StartGateway, TestStores
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.operator import Operator

MODEL, CHAT = "plain:7b", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
# A line of a header, a terminal's escape, a character that no header has, a NUL, and what a spreadsheet computes.
HOSTILE = "\r\nSet-Cookie: a=b\x1b[31m\u00fc\x00=1+1"
CLEANED = "tools.??Set-Cookie:?a?b??31m???1?1"
LONG = "x" * 10_000
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {"max_tokens": 9, "messages": HELLO, "tools": [{"type": HOSTILE, "name": "a"}]}),
    ("/v1/responses", {"input": "Hello", "tools": [{"type": HOSTILE}]}),
]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "body"), WAYS, ids=[path for path, _ in WAYS])
def test_headers_for_keys_with_the_right_are_safe(
    start_gateway: StartGateway, path: str, body: dict[str, Any], streamed: bool
) -> None:
    with FakeBackend("openai", [MODEL]) as plain:
        gateway = start_gateway(plain)
        sent = {"model": MODEL, "stream": streamed, **body}
        with gateway.http(gateway.key(flags=(SHOW_BACKEND,))) as shown, gateway.http(gateway.key()) as hidden:
            seen, plain_answer = shown.post(path, json=sent), hidden.post(path, json=sent)
        assert (seen.status_code, plain_answer.status_code) == (200, 200), seen.text
        assert seen.headers["x-gateway-translated-to"] == CHAT and seen.headers["x-gateway-dropped"] == CLEANED
        assert "set-cookie" not in seen.headers
        assert not [name for name in plain_answer.headers if "gateway" in name and name != "access-control-expose-headers"]
        for row in gateway.audit_rows():
            assert (row["translated_to"], row["dropped"]) == (CHAT, CLEANED)
        for line in gateway.request_lines():
            assert (line["translated_to"], line["dropped"]) == (CHAT, CLEANED)


def test_names_without_end_are_bounded_everywhere(start_gateway: StartGateway) -> None:
    tools = [{"type": f"{number}{LONG}", "name": "a"} for number in range(100)]
    with FakeBackend("openai", [MODEL]) as plain:
        gateway = start_gateway(plain)
        with gateway.http(gateway.key(flags=(SHOW_BACKEND,))) as client:
            for path, body in WAYS:
                answer = client.post(path, json={"model": MODEL, **body, "tools": tools})
                assert answer.status_code == 200 and len(answer.headers["x-gateway-dropped"]) <= 500
        assert all(len(row["dropped"]) <= 400 for row in gateway.audit_rows())
        assert all(len(line["dropped"]) < 2500 for line in gateway.request_lines())


def test_requests_that_are_passed_through_show_no_way(start_gateway: StartGateway) -> None:
    with FakeBackend(models=[MODEL], name="native", is_native=True) as native:
        gateway = start_gateway(native)
        with gateway.http(gateway.key(flags=(SHOW_BACKEND,))) as client:
            answer = client.post("/v1/messages", json={"model": MODEL, "max_tokens": 9, "messages": HELLO})
        assert answer.status_code == 200 and answer.headers["x-gateway-backend"] == "native"
        assert not {"x-gateway-translated-to", "x-gateway-dropped"} & answer.headers.keys()
        [row] = gateway.audit_rows()
        assert (row["translated_to"], row["dropped"]) == (None, None)


def test_what_two_backends_did_not_get_is_named_once(start_gateway: StartGateway) -> None:
    with (
        FakeBackend(models=[MODEL], name="native", is_native=True) as native,
        FakeBackend("openai", [MODEL], name="plain") as plain,
    ):
        gateway = start_gateway(native, plain)
        native.play("/v1/messages", answer(503))
        body = {"model": MODEL, "max_tokens": 9, "messages": HELLO, "context_management": {"edits": []}}
        with gateway.http(gateway.key(flags=(SHOW_BACKEND,))) as client:
            got = client.post("/v1/messages", json=body)
    assert (got.status_code, got.headers["x-gateway-backend"]) == (200, "plain")
    assert got.headers["x-gateway-dropped"] == "context_management"


def test_operators_see_the_way(start_gateway: StartGateway, stores: TestStores, tmp_path: Path) -> None:
    operator = Operator(tmp_path, stores)
    with FakeBackend("openai", [MODEL]) as plain:
        gateway = start_gateway(plain)
        operator.with_backends(plain)
        with gateway.http(gateway.key()) as client:
            path, body = WAYS[0]
            sent = {"model": MODEL, **body, "thinking": {"type": "adaptive", "display": "omitted"}}
            assert client.post(path, json=sent, headers={"X-Request-ID": "one"}).status_code == 200
        [row] = gateway.audit_rows()
        assert row["dropped"].split(", ")[0] and row["dropped"].count(CLEANED) == 1
        story = operator.gets("trace", "--id", "one")
        assert f"  way      translated to {CHAT}\n" in story and f"  dropped  {row['dropped']}\n" in story
        [as_json] = [json.loads(line) for line in operator.gets("audit", "--json").splitlines()]
        [as_csv] = csv.DictReader(io.StringIO(operator.gets("audit", "--csv")))
        with gateway.http(gateway.key(flags=(ADMIN,))) as admin:
            [listed] = admin.get("/admin/v1/audit?since=1h").json()
            [traced] = admin.get("/admin/v1/requests/one").json()
        for shown in (as_json, as_csv, listed, traced):
            assert (shown["translated_to"], shown["dropped"]) == (CHAT, row["dropped"])
