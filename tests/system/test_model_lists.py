"""`/v1/models` in the form of the client that asks: Anthropic's with pages and errors, OpenAI's with one field for Codex."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import anthropic
import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.errors import BadRequest
from gateway.dialects.translation.messages_models import MOST_OF_A_PAGE, models_page
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import answer
from tests.support.running_gateway import RunningGateway

NAMES = [f"model-{number}:latest" for number in range(5)]
VERSION = {"anthropic-version": "2023-06-01"}


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Iterator[RunningGateway]:
    with FakeBackend(models=list(NAMES), name="alpha") as alpha:
        yield start_gateway(alpha, MODEL_ALIASES='{"claude-sonnet-4-5": "model-1"}')


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=gateway.url, api_key=gateway.key(), max_retries=0) as found:
        yield found


def test_the_official_client_lists_all_models(client: anthropic.Anthropic) -> None:
    every = [*NAMES, "claude-sonnet-4-5"]
    page = client.models.list()
    assert [model.id for model in page.data] == every and page.has_more is False
    assert (page.first_id, page.last_id) == (every[0], every[-1])
    for size in (1, 2, 3, 6, 1000):
        assert [model.id for model in client.models.list(limit=size)] == every
    model = page.data[0]
    raw = client.models.with_raw_response.list()
    assert raw.headers["request-id"] == raw.headers["x-request-id"] and "anthropic-ratelimit-requests-limit" in raw.headers
    assert (model.type, model.display_name, model.lifecycle) == ("model", NAMES[0], "active")
    assert datetime(1970, 1, 1, tzinfo=UTC) <= model.created_at <= datetime.now(UTC)


def test_the_official_client_reads_pages_backwards_and_from_the_middle(client: anthropic.Anthropic) -> None:
    page = client.models.list(before_id=NAMES[4], limit=2)
    assert [model.id for model in page.data] == NAMES[2:4] and page.has_more
    assert [model.id for model in page.get_next_page().data] == NAMES[0:2]
    assert not page.get_next_page().has_more
    assert [model.id for model in client.models.list(after_id=NAMES[3])] == [NAMES[4], "claude-sonnet-4-5"]
    empty = client.models.list(after_id="claude-sonnet-4-5")
    assert (empty.data, empty.has_more, empty.first_id, empty.last_id) == ([], False, None, None)


def test_the_official_client_gets_one_model(client: anthropic.Anthropic) -> None:
    for name in ("model-1", "claude-sonnet-4-5", "model-2:latest"):
        model = client.models.retrieve(name)
        assert (model.id, model.type) == (name, "model") and model._request_id


def test_errors_have_the_form_of_anthropic(gateway: RunningGateway, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.PermissionDeniedError) as missing:
        client.models.retrieve("no-such-model")
    body: Any = missing.value.body
    assert body["type"] == "error" and body["error"]["type"] == "permission_error" and missing.value.request_id
    wrong: list[dict[str, Any]] = [{"limit": 0}, {"limit": 1001}, {"after_id": "x"}, {"before_id": "no"}]
    for options in [*wrong, {"after_id": NAMES[0], "before_id": NAMES[1]}]:
        with pytest.raises(anthropic.BadRequestError) as refused:
            client.models.list(**options)
        reason: Any = refused.value.body
        assert reason["error"]["type"] == "invalid_request_error" and any(name in str(reason) for name in options)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="nz_wrong").models.list()
    with gateway.http(gateway.key(rpm=1)) as limited:
        statuses = [limited.get("/v1/models", headers=VERSION) for _ in range(2)]
        assert [one.status_code for one in statuses] == [200, 429]
        assert statuses[1].json()["error"]["type"] == "rate_limit_error" and statuses[1].json()["request_id"]
        assert limited.put("/v1/models", headers=VERSION).json()["error"]["type"] == "invalid_request_error"
        # The path decides for all others.
        assert "type" not in limited.get("/v1/nothing", headers=VERSION).json()


def test_without_the_header_the_list_is_as_openai_has_it(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key()) as client:
        assert set(client.get("/v1/models").json()) == {"object", "data"}
        assert set(client.get("/v1/models?limit=0&after_id=x").json()) == {"object", "data"}
        assert client.get("/v1/models/model-1").json()["object"] == "model"
        assert client.get("/v1/models?" + "a=b&" * 51).status_code == 400


def codex(client: httpx.Client, path: str = "/v1/models", **headers: str) -> list[dict[str, Any]]:
    listed = client.get(path, headers=headers).json()
    assert listed["object"] == "list" and listed["data"]
    found: list[dict[str, Any]] = listed.get("models", [])
    return found


def test_codex_gets_the_models_as_it_reads_them(start_gateway: StartGateway) -> None:
    entry = {"id": "coder", "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": 32_768}
    with FakeBackend(kind="openai", models=["coder"], name="alpha") as alpha, FakeBackend(models=["bge"], name="beta") as beta:
        alpha.play("/v1/models", answer(200, {"object": "list", "data": [entry]}))
        tags = {"name": "bge:latest", "model": "bge:latest", "capabilities": ["embedding"]}
        beta.play("/api/tags", answer(200, {"models": [tags, {"name": "eye:1b", "capabilities": ["completion", "vision"]}]}))
        gateway = start_gateway(alpha, beta, MODEL_ALIASES='{"gpt-5-codex": "coder"}')
        with gateway.http(gateway.key()) as client:
            for found in (
                codex(client, "/v1/models?client_version=0.72.0"),
                codex(client, **{"User-Agent": "codex_cli_rs/0.72.0 (Linux)"}),
                codex(client, **{"User-Agent": "Codex Desktop"}),
            ):
                assert [model["slug"] for model in found] == ["coder", "eye:1b", "gpt-5-codex"]
                assert [model.get("context_window") for model in found] == [32_768, None, 32_768]
                assert [model["input_modalities"] for model in found] == [["text"], ["text", "image"], ["text"]]
            assert codex(client) == codex(client, **{"User-Agent": "OpenAI/Python"}) == []
        with gateway.http(gateway.key("gpt-5-codex")) as client:
            assert [model["slug"] for model in codex(client, "/v1/models?client_version=1")] == ["gpt-5-codex"]


ENTRY = st.fixed_dictionaries({"id": st.sampled_from("abcdef"), "created": st.integers() | st.floats() | st.none()})
ENTRIES = st.lists(ENTRY, unique_by=lambda entry: str(entry["id"]))


def pages(entries: list[dict[str, Any]], cursor: str, name: str, query: dict[str, str]) -> list[list[str]]:
    """The names of each page, from the one that `query` asks for, in the order in which they are read."""
    found: list[list[str]] = []
    while True:
        page = models_page(entries, query)
        json.dumps(page, allow_nan=False)
        found.append([model["id"] for model in page["data"]])
        if not page["has_more"]:
            return found
        query[cursor] = page[name]


@given(entries=ENTRIES, size=st.integers(1, 7))
def test_pages_together_are_the_list(entries: list[dict[str, Any]], size: int) -> None:
    names = [entry["id"] for entry in entries]
    forwards = pages(entries, "after_id", "last_id", {"limit": str(size)})
    assert [name for page in forwards for name in page] == names
    if names:
        backwards = pages(entries, "before_id", "first_id", {"limit": str(size), "before_id": names[-1]})
        assert [name for page in reversed(backwards) for name in page] == names[:-1]
    assert all(len(page) <= size for page in forwards)


@given(entries=ENTRIES, query=st.dictionaries(st.sampled_from(["limit", "after_id", "before_id", "x"]), st.text()))
def test_any_query_gets_a_page_or_is_refused_by_name(entries: list[dict[str, Any]], query: dict[str, str]) -> None:
    try:
        assert len(models_page(entries, query)["data"]) <= MOST_OF_A_PAGE
    except BadRequest as refused:
        assert any(name in refused.message for name in query)
