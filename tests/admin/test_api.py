"""What operators do by script: for keys with the role alone, each deed in the audit, what is wrong named."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateway import endpoints
from gateway.auth import key_store
from gateway.auth.key import ADMIN, ADMIN_MODELS, SHOW_BACKEND
from gateway.core.errors import CommandFailed, NotFound
from tests.conftest import StartGateway
from tests.support.documents import page
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

MODEL = "llama3.2:latest"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": False}


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend) -> RunningGateway:
    return start_gateway(alpha, beta)


@pytest.fixture
def admin(gateway: RunningGateway) -> Iterator[httpx.Client]:
    with gateway.http(gateway.key(name="ops", flags=(ADMIN,))) as client:
        client.base_url = httpx.URL(f"{gateway.url}/admin/v1")
        yield client


def routes_of(gateway: RunningGateway) -> list[tuple[str, str]]:
    table = endpoints.table(gateway.settings, gateway.components)
    return [(method, path) for method, path in table if path.startswith("/admin/")]


def test_only_keys_with_the_role_may_use_it(gateway: RunningGateway) -> None:
    user = gateway.key(flags=(ADMIN_MODELS, SHOW_BACKEND))
    routes = routes_of(gateway)
    assert len(routes) == 20
    with gateway.http() as nobody, gateway.http(user) as somebody:
        for method, path in routes:
            where = path.replace("{name}", "alpha").replace("{id}", "x")
            assert nobody.request(method, where, json={}).status_code == 401, where
            refused = somebody.request(method, where, json={})
            assert (refused.status_code, "role admin" in refused.json()["error"]) == (403, True), where


def test_the_life_of_a_key(gateway: RunningGateway, admin: httpx.Client) -> None:
    wanted = {"name": "alice", "models": ["llama3*"], "rpm": 7, "day": "unlimited", "expires": "30d", "show_backend": True}
    made = admin.post("/keys", json=wanted)
    assert made.status_code == 201
    key_id, whole = made.json()["id"], made.json()["key"]
    with gateway.http(whole) as alice:
        assert alice.post("/api/chat", json=CHAT).headers["x-gateway-backend"] == "alpha"
        [listed] = [row for row in admin.get("/keys").json() if row["name"] == "alice"]
        facts = (listed["models"], listed["rpm"], listed["day"], listed["flags"], listed["state"])
        assert facts == (["llama3*"], 7, "unlimited", ["show_backend"], "active")
        assert whole.split("_")[2] not in json.dumps(admin.get("/keys").json()), "a key is shown once"

        limited = admin.patch(f"/keys/{key_id}", json={"rpm": 1, "day": None})
        assert (limited.json()["rpm"], limited.json()["day"], limited.json()["everywhere_at_once"]) == (1, None, True)
        until(lambda: alice.post("/api/chat", json=CHAT).status_code == 429, 5)
        assert admin.patch(f"/keys/{key_id}", json={"rpm": None, "model": "llama3*", "tpm": 1000}).json()["model"] == "llama3*"

        turned = admin.post(f"/keys/{key_id}/rotate", json={"overlap": "0"})
        assert turned.status_code == 201
        until(lambda: alice.get("/v1/models").status_code == 401, 5)
    with gateway.http(turned.json()["key"]) as alice:
        assert alice.get("/v1/models").status_code in (200, 429)
        assert admin.delete(f"/keys/{key_id}").json() == {"id": key_id, "revoked": True, "everywhere_at_once": True}
        until(lambda: alice.get("/v1/models").status_code == 401, 5)
    assert admin.delete(f"/keys/{key_id}").status_code == 404
    gateway.wait_idle()
    details = {row["detail"] for row in gateway.audit_rows() if row["route"].startswith("/admin/") and row["method"] != "GET"}
    assert details >= {"make key alice", f"limit key {key_id}", f"rotate key {key_id}", f"revoke key {key_id}"}
    assert whole not in json.dumps(gateway.audit_rows(), default=str)


def test_ids_and_names_are_not_confused(gateway: RunningGateway, admin: httpx.Client) -> None:
    """A deletion that is sent twice must not end another key."""
    first = admin.post("/keys", json={"name": "first"}).json()["id"]
    assert admin.delete(f"/keys/{first}").status_code == 200
    refused = admin.post("/keys", json={"name": first})
    assert refused.status_code == 409 and "is the id of a key" in refused.json()["error"]
    # One that an older release has made.
    other = admin.post("/keys", json={"name": "other"}).json()
    gateway.call(rename(gateway, other["id"], first))
    ways = [("DELETE", "", None), ("POST", "/rotate", {"overlap": "1h"}), ("PATCH", "", {"rpm": 1})]
    for method, verb, body in ways:
        for word in (first, "ops"):
            answered = admin.request(method, f"/keys/{word}{verb}", json=body)
            assert (answered.status_code, "no active key" in answered.json()["error"]) == (404, True), (method, word)
    for path in (f"/explain?key={first}&model={MODEL}", "/explain?key=nobody&model=x"):
        assert admin.get(path).status_code == 404
    assert admin.get(f"/audit?key={first}").json() == []
    with gateway.http(other["key"]) as client:
        assert client.post("/api/chat", json=CHAT).status_code == 200
    assert admin.delete(f"/keys/{other['id']}").status_code == 200
    with pytest.raises(NotFound):
        gateway.call(gateway.key_store().revoke(first))


async def rename(gateway: RunningGateway, key_id: str, name: str) -> None:
    async with gateway.components.database.connection() as connection:
        await connection.execute("UPDATE keys SET name = $2 WHERE id = $1", key_id, name)


def test_backends_are_drained_and_probed(
    gateway: RunningGateway, admin: httpx.Client, alpha: FakeBackend, beta: FakeBackend
) -> None:
    with gateway.http(gateway.key()) as client:
        assert admin.post("/backends/alpha/drain").json() == {"backend": "alpha", "drained": True, "everywhere_at_once": True}
        until(lambda: gateway.components.backends["alpha"].is_drained, 5)
        assert client.post("/api/chat", json=CHAT).status_code == 200
        assert (len(alpha.calls("/api/chat")), len(beta.calls("/api/chat"))) == (0, 1)
        until(lambda: admin.get("/backends").json()[0]["drained"] is not None, 5)
        assert admin.post("/backends/alpha/undrain").status_code == 200
        until(lambda: not gateway.components.backends["alpha"].is_drained, 5)
        assert client.post("/api/chat", json=CHAT).status_code == 200
        assert len(alpha.calls("/api/chat")) == 1
    probed = admin.post("/backends/beta/probe").json()
    assert (probed["backend"], probed["reachable"], probed["models"], probed["problem"]) == ("beta", True, 1, None)
    assert probed["speaks"] == ["ollama", "openai"] == admin.get("/backends").json()[1]["speaks"]
    assert [row["models"] for row in admin.post("/refresh").json()["backends"]] == [1, 1]
    assert admin.post("/backends/omega/drain").status_code == 404


def test_the_overview(gateway: RunningGateway, admin: httpx.Client, beta: FakeBackend) -> None:
    tight = gateway.key(name="tight", rpm=1)
    with gateway.http(gateway.key(name="busy")) as busy, gateway.http(tight) as limited:
        for _ in range(5):
            busy.post("/api/chat", json=CHAT)
        assert [limited.post("/api/chat", json=CHAT).status_code for _ in range(3)] == [200, 429, 429]
    answers: list[dict[str, Any]] = []

    def is_complete() -> bool:
        answers.append(admin.get("/overview").json())
        # A Redis that answers late counts as unreachable, and then nobody knows the number of processes.
        return (answers[-1]["lately"] or {}).get("requests", 0) >= 8 and answers[-1]["processes"] is not None

    until(is_complete, 15)
    seen = answers[-1]
    assert seen["processes"] == 1 and seen["stores"] == {"redis": True, "postgresql": True}
    assert seen["postgresql_takes_writes"] is True
    assert [(row["name"], row["state"], row["breaker"], row["models"]) for row in seen["backends"]] == [
        ("alpha", "up", "closed", 1),
        ("beta", "up", "closed", 1),
    ]
    busiest = {row["key"]: row for row in seen["lately"]["keys"]}
    assert (busiest["busy"]["requests"], busiest["busy"]["limited"], busiest["busy"]["limit"]) == (5, 0, None)
    assert (busiest["tight"]["requests"], busiest["tight"]["limited"], busiest["tight"]["limit"]) == (3, 2, "rpm")
    [model] = seen["lately"]["models"]
    assert (model["model"], model["requests"]) == (MODEL, 8) and model["tokens"] > 0 and model["ttfb_p50_ms"] > 0
    for window in ("15m", "24h", "30d"):
        series = admin.get("/series", params={"window": window}).json()
        assert sum(step["requests"] for step in series["steps"]) >= 8 and series["step_s"] > 0


def test_the_audit_and_one_request(gateway: RunningGateway, admin: httpx.Client) -> None:
    with gateway.http(gateway.key(name="alice")) as alice:
        alice.post("/api/chat", json=CHAT, headers={"X-Request-ID": "a-story"})
        alice.post("/api/chat", json={**CHAT, "model": "unheard-of"})
    until(lambda: len(admin.get("/audit", params={"key": "alice"}).json()) == 2, 15)
    [refused] = admin.get("/audit", params={"key": "alice", "status": "4xx", "since": "1h", "limit": "5"}).json()
    assert refused["outcome"] == "refused:model_not_available"
    assert [row["model"] for row in admin.get("/audit", params={"model": "llama*", "outcome": "answered"}).json()] == [MODEL]
    [row] = admin.get("/requests/a-story").json()
    assert (row["key"], row["backend"], row["attempts"]) == ("alice", "alpha", [])
    assert admin.get(f"/requests/{row['id']}").json() == [row]
    [sums] = [row for row in admin.get("/usage", params={"by": "key,model"}).json() if row["model"] == MODEL]
    assert (sums["key"], sums["requests"], sums["answered"]) == ("alice", 1, 1) and "backend" not in sums
    explained = admin.get("/explain", params={"key": "alice", "model": MODEL, "client": "ollama"}).json()
    assert (explained["status"], explained["backend"]) == (200, "alpha")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/series?window=1y", None, 400, "window must be one of 15m, 24h, 30d"),
        ("GET", "/audit?status=teapot", None, 400, "'teapot' is not a status: write a number such as 429"),
        ("GET", "/audit?since=then", None, 400, "'then' is not a time: write 24h"),
        (
            "GET",
            "/audit?colour=red",
            None,
            400,
            "'colour' is not a parameter of this route: it takes key, limit,",
        ),
        ("GET", "/audit?key=nobody", None, 404, "there is no key 'nobody'"),
        ("GET", "/requests/unheard-of", None, 404, "no request 'unheard-of' in the audit"),
        ("GET", "/usage?by=colour", None, 400, "'colour' is not something to group by: write one or more of key,model"),
        ("GET", "/explain?model=x", None, 400, "set key= to a key's id or name, and model= to a model"),
        ("POST", "/keys", {}, 400, "a key's name must be 1 to 200 printable characters"),
        ("POST", "/keys", {"name": "ops"}, 409, "a key named 'ops' exists"),
        ("POST", "/keys", {"name": "x", "colour": 1}, 400, "'colour' is not a parameter of this route"),
        ("POST", "/keys", {"name": "x", "rpm": -1}, 400, "the field 'rpm' must be a whole number from 0"),
        ("POST", "/keys", {"name": "x", "rpm": True}, 400, "the field 'rpm' must be a whole number from 0"),
        ("POST", "/keys", {"name": "x", "role": "root"}, 400, "the field 'role' must be"),
        ("POST", "/keys", {"name": "x", "models": "all"}, 400, "the field 'models' must be a list of names or globs"),
        ("POST", "/keys", {"name": "x", "expires": "soon"}, 400, "'soon' is not a duration: write 90s"),
        ("POST", "/keys", {"name": "x", "retention": "7d"}, 400, "'retention' is for the prompts that 'prompt_log' keeps"),
        ("POST", "/keys", {"name": "x", "prompt_log": "yes"}, 400, "the field 'prompt_log' must be true or false"),
        ("POST", "/keys", {"name": "x", "weight": 0}, 400, "the field 'weight' must be a number above 0 and at most 1000"),
        ("POST", "/keys", {"name": "x", "weight": True}, 400, "the field 'weight' must be a number above 0"),
        ("POST", "/keys", {"name": "x", "heartbeat_after_s": "5"}, 400, "'heartbeat_after_s' must be a number of seconds"),
        ("POST", "/keys", {"name": "x", "batch": 1}, 400, "the field 'batch' must be true or false"),
        ("PATCH", "/keys/nobody", {"rpm": 1}, 404, "there is no active key with the id 'nobody'"),
        ("PATCH", "/keys/ops", {}, 400, "set at least one of rpm, tpm, concurrent, day, month"),
        ("POST", "/keys/ops/rotate", {"overlap": "a while"}, 400, "'a while' is not a duration"),
        ("POST", "/keys/ops/rotate", {"overlap": 5}, 400, "the field 'overlap' must be a string"),
    ],
)
def test_errors_name_what_is_wrong(
    admin: httpx.Client, method: str, path: str, body: dict[str, Any] | None, status: int, words: str
) -> None:
    refused = admin.request(method, path, json=body)
    assert refused.status_code == status, refused.text
    assert words in refused.json()["error"]


def test_the_rules_of_a_key_are_bounded(gateway: RunningGateway, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_store, "MOST_RULES", 3)
    key_id = admin.post("/keys", json={"name": "alice"}).json()["id"]
    where, message = f"/keys/{key_id}", "limits for at most 3 models or globs"

    def limit(number: int, rpm: int | None = 5) -> int:
        return admin.patch(where, json={"rpm": rpm, "model": f"m{number}*"}).status_code

    assert [limit(number) for number in (1, 2, 3, 4, 3)] == [200, 200, 200, 400, 200]
    assert message in admin.patch(where, json={"rpm": 5, "model": "m4*"}).json()["error"]
    with pytest.raises(CommandFailed, match=message):
        gateway.call(gateway.key_store().limit("alice", "m5*", {"rpm": 5}))
    assert [limit(1, None), limit(4)] == [200, 200]


def test_the_share_of_a_key(admin: httpx.Client) -> None:
    key_id = admin.post("/keys", json={"name": "x", "weight": 2.5, "batch": True, "month_seconds": 9}).json()["id"]
    row = next(row for row in admin.get("/keys").json() if row["id"] == key_id)
    assert (row["weight"], row["heartbeat_after_s"], row["month_seconds"], row["flags"]) == (2.5, None, 9, ["batch"])
    now = admin.patch(f"/keys/{key_id}", json={"weight": None, "heartbeat_after_s": 5, "day_seconds": 7}).json()
    assert (now["weight"], now["heartbeat_after_s"], now["day_seconds"], now["month_seconds"]) == (1, 5, 7, 9)
    refused = admin.patch(f"/keys/{key_id}", json={"weight": 2, "model": "llama*"})
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        "WEIGHT can only be set for a key as a whole, not for some of its models",
    )


def test_an_admin_has_limits_too(gateway: RunningGateway) -> None:
    with gateway.http(gateway.key(flags=(ADMIN,), rpm=1)) as admin:
        assert [admin.get("/admin/v1/keys").status_code for _ in range(2)] == [200, 429]


def test_the_page_of_the_admin_api_lists_every_route(gateway: RunningGateway) -> None:
    listed = re.findall(r"^\| `([A-Z]+) (/admin/v1/[^`?]*)", page("docs/reference/admin-api.md"), re.MULTILINE)
    assert listed == routes_of(gateway)


def test_the_page_of_the_admin_api_names_every_parameter(gateway: RunningGateway) -> None:
    rows = [line for line in page("docs/reference/admin-api.md").splitlines() if line.startswith("| `")]
    table = endpoints.table(gateway.settings, gateway.components)
    for (method, path), endpoint in table.items():
        if path.startswith("/admin/"):
            [row] = [row for row in rows if re.match(rf"\| `{method} {re.escape(path)}[`?]", row)]
            named = set(re.findall(r"[\w]+", row))
            assert set(getattr(endpoint, "takes", ())) <= named, f"{method} {path}"
