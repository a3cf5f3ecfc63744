"""Lines that differ in each request do not reach a backend, whose prompt cache they would empty."""

import json
from typing import Any

import pytest

from gateway.auth.key import KEEP_VOLATILE_LINES
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend

LINE = "x-anthropic-billing-header: cc_version=2.1.197.6a5; cc_entrypoint=cli;"
SYSTEM = [{"type": "text", "text": LINE}, {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
BODY: dict[str, Any] = {"model": "llama3.2", "max_tokens": 9, "system": SYSTEM, "messages": [{"role": "user", "content": "hi"}]}
PATHS = {True: "/v1/messages", False: "/v1/chat/completions"}


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(
    ("setting", "flags", "stays"), [("true", (), False), ("true", (KEEP_VOLATILE_LINES,), True), ("false", (), True)]
)
def test_the_line_is_taken_out_unless_an_operator_keeps_it(
    start_gateway: StartGateway, is_native: bool, setting: str, flags: tuple[str, ...], stays: bool
) -> None:
    with FakeBackend(name="alpha", is_native=is_native) as alpha:
        gateway = start_gateway(alpha, STRIP_VOLATILE_PROMPT_LINES=setting)
        with gateway.http(gateway.key(flags=flags)) as client:
            for path in ("/v1/messages", "/v1/messages?beta=true"):
                assert client.post(path, json=BODY).status_code == 200
        sent = [call.json for call in alpha.calls(PATHS[is_native]) if call.body != b"[]"]
    assert len(sent) == 2
    assert [LINE in json.dumps(body) for body in sent] == [stays, stays]
    assert all("Be brief." in json.dumps(body) for body in sent)
    if is_native:
        assert sent[0]["system"] == SYSTEM[0 if stays else 1 :]
