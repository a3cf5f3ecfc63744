"""Any request to any route of the API document gets an answer that the document describes, and never a 500."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from gateway.auth.key import ADMIN, ADMIN_MODELS
from tests.conftest import StartGateway
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import Memory
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
TOKEN = "a-token-of-metrics"
EVERYTHING = {
    "DOCS_ENABLED": "true",
    "DASHBOARD_ENABLED": "true",
    "PLAYGROUND_ENABLED": "true",
    "METRICS_TOKEN": TOKEN,
    "AUTH_FAILURE_RATE_LIMIT_PER_IP_PER_MIN": "1000000",
}
# Half of the generated values are replaced by ones that exist.
BLOB, REQUEST = b"hello", "my-request-1"
Operation = APIOperation[Any, Any, Any, Any]
KNOWN = {"name": "spare", "key": "alice", "model": MODEL, "digest": f"sha256:{hashlib.sha256(BLOB).hexdigest()}"}
IDS = {"/admin/v1/requests/{id}": REQUEST, "/v1/models/{id}": MODEL}
EXAMPLES = 12
UNENDING = "/admin/v1/events"


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Iterator[RunningGateway]:
    """A server like vLLM has the routes that Ollama lacks."""
    with (
        FakeBackend(models=[MODEL], name="ollama") as first,
        FakeBackend(models=[], name="spare") as second,
        FakeBackend(kind="openai", models=[MODEL], name="vllm") as third,
    ):
        # It unloads what it is asked to; otherwise that would be watched for ten seconds.
        first.healthy.memory = Memory()
        yield start_gateway(first, second, third, **EVERYTHING)


def strict_document(gateway: RunningGateway) -> dict[str, Any]:
    """The document without errors of backends: these backends refuse nothing, so every error must be documented."""
    with gateway.http() as client:
        document: dict[str, Any] = client.get("/openapi.json").json()
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("4XX", None)
            # Another test covers keys.
            del operation["security"]
    return document


def prepare(case: Case[Any], key_id: str, *, known: bool) -> Case[Any]:
    """Replaces generated values by existing ones, except where they are wrong on purpose."""
    is_wrong = case.meta is not None and case.meta.generation.mode is GenerationMode.NEGATIVE
    if not known or (is_wrong and "digest" in case.path_parameters):
        return case
    known_here = KNOWN | {"id": IDS.get(case.operation.path, key_id)}
    for part in ["path_parameters"] if is_wrong else ["path_parameters", "query", "body"]:
        made = getattr(case, part)
        if isinstance(made, dict):
            setattr(case, part, {name: known_here.get(name, value) for name, value in made.items()})
    if case.operation.path == "/api/blobs/{digest}" and case.method == "POST":
        case.body = BLOB
    return case


def without(operation: Operation) -> list[Any]:
    """The checks to exclude: only the backend can judge a body, unless the route is the gateway's own."""
    is_ours = "Admin" in operation.definition.raw["tags"]
    return [] if is_ours else [checks.negative_data_rejection, checks.positive_data_acceptance]


def modes(operation: Operation) -> list[GenerationMode]:
    """Operations that accept any text have no wrong values."""
    raw = operation.definition.raw
    parameters = raw.get("parameters", ())
    has_wrong = "requestBody" in raw or any(one["in"] == "query" or "pattern" in one["schema"] for one in parameters)
    return [GenerationMode.POSITIVE, GenerationMode.NEGATIVE] if has_wrong else [GenerationMode.POSITIVE]


class Fuzzer:
    """Sends requests to each operation; `statuses` are the statuses received, by operation."""

    def __init__(self, gateway: RunningGateway) -> None:
        self.gateway = gateway
        self.key = gateway.key(name="ops", flags=(ADMIN, ADMIN_MODELS))
        self.alice = gateway.key(name="alice")
        self.statuses: dict[str, set[int]] = defaultdict(set)

    def ask(self, operation: Operation, case: Case[Any], known: bool) -> None:
        # The fuzzer's own key must not be revoked.
        key = TOKEN if operation.path == "/metrics" else self.key
        answer = prepare(case, self.alice.split("_")[1], known=known).call(
            base_url=self.gateway.url, headers={"Authorization": f"Bearer {key}"}
        )
        self.statuses[f"{operation.method} {operation.path}"].add(answer.status_code)
        case.validate_response(answer, excluded_checks=without(operation))

    def all_of(self, operation: Operation) -> None:
        for mode in modes(operation):

            @settings(
                max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
            )
            @given(known=st.booleans(), case=operation.as_strategy(generation_mode=mode))
            def ask(known: bool, case: Case[Any]) -> None:
                self.ask(operation, case, known)

            ask()


@pytest.mark.long(seconds=10)
@pytest.mark.timeout(300)
def test_every_answer_is_in_the_api_document(gateway: RunningGateway) -> None:
    fuzzer = Fuzzer(gateway)
    with gateway.http(fuzzer.alice) as client:
        assert client.get("/api/tags", headers={"X-Request-ID": REQUEST}).status_code == httpx.codes.OK
    gateway.audit_rows()
    schema = schemathesis.openapi.from_dict(strict_document(gateway))
    # Operations that create something come first, those that delete something last.
    turns = ["head", "delete"]
    operations = sorted(
        (made.ok() for made in schema.get_all_operations() if isinstance(made, Ok)),
        key=lambda one: turns.index(one.method) if one.method in turns else -1,
    )
    assert len(operations) >= 55
    for operation in operations:
        if operation.path != UNENDING:
            fuzzer.all_of(operation)
    unanswered = {line for line, seen in fuzzer.statuses.items() if not any(status < 300 for status in seen)}
    # This backend has no account, and no searches.
    assert {line.partition(" ")[2] for line in unanswered} <= {
        "/api/me",
        "/api/signout",
        "/api/status",
        "/api/experimental/web_search",
        "/api/experimental/web_fetch",
        "/api/experimental/model-recommendations",
    }
    assert not any(status == 500 for seen in fuzzer.statuses.values() for status in seen)
    # Redis can answer late on a busy machine, which no route causes.
    others = [record for record in gateway.logged.records if record.name != "gateway.store"]
    assert not [record for record in others if record.levelname == "ERROR"]


def test_requests_without_a_key_or_with_a_wrong_one(gateway: RunningGateway) -> None:
    with gateway.http() as client:
        document = client.get("/openapi.json").json()
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                where = path.format(id="x", name="x", digest=KNOWN["digest"])
                found = {client.request(method, where, headers=key).status_code for key in ({}, {"X-API-Key": "wrong"})}
                is_open = not operation["security"] or {} in operation["security"]
                assert found == ({404 if path == "/metrics" else 200} if is_open else {401}), (method, path)
                assert {str(status) for status in found} <= operation["responses"].keys()


def test_the_endless_event_stream(gateway: RunningGateway) -> None:
    document = strict_document(gateway)
    seen = set()
    for key in ("", "wrong", gateway.key(), gateway.key(flags=(ADMIN,))):
        with gateway.http(key) as client, client.stream("GET", UNENDING) as answer:
            seen.add(answer.status_code)
            if answer.status_code == httpx.codes.OK:
                assert next(answer.iter_lines()).startswith("data: {")
    assert seen == {200, 401, 403}
    assert {str(status) for status in seen} <= document["paths"][UNENDING]["get"]["responses"].keys()
