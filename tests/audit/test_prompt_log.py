"""Prompts and answers are kept only for keys with a prompt log: bounded, until they expire, and nowhere else."""

import json
from datetime import timedelta
from typing import Any

import pytest

from gateway.stores import redis_keys
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS, MODEL, Chat
from tests.support.fake_backend.backend import FakeBackend
from tests.support.processes import until
from tests.support.running_gateway import RunningGateway

CANARY = "canary-prompt-77c1"


def prompts(gateway: RunningGateway) -> list[dict[str, Any]]:
    gateway.audit_rows()

    async def fetch() -> list[dict[str, Any]]:
        async with gateway.components.database.connection() as connection:
            return [dict(row) for row in await connection.fetch("SELECT * FROM prompts ORDER BY at")]

    return gateway.call(fetch())


@pytest.fixture
def gateway(start_gateway: StartGateway, alpha: FakeBackend) -> RunningGateway:
    return start_gateway(alpha)


@pytest.mark.parametrize("chat", CHATS, ids=str)
def test_request_and_answer_are_kept_as_text(gateway: RunningGateway, chat: Chat) -> None:
    body = {**chat.body, "messages": [{"role": "user", "content": f"Keep {CANARY}"}]}
    with gateway.http(gateway.key(prompt_log=True)) as client:
        assert client.post(chat.path, json=body).status_code == 200
    until(lambda: prompts(gateway))
    (kept,) = prompts(gateway)
    assert CANARY in kept["request"] and kept["answer"] == f"alpha heard: Keep {CANARY}" and not kept["is_cut"]
    assert kept["id"] == gateway.audit_rows()[0]["id"]
    assert timedelta(days=29) < kept["expires_at"] - kept["at"] < timedelta(days=31)
    assert CANARY not in str([record.__dict__ for record in gateway.logged.records if record.name.startswith("gateway")])


def test_other_keys_keep_no_prompts(gateway: RunningGateway, stores: TestStores) -> None:
    with gateway.http(gateway.key()) as client:
        for chat in CHATS:
            client.post(chat.path, json={**chat.body, "messages": [{"role": "user", "content": CANARY}]})
    assert prompts(gateway) == []
    assert CANARY not in str(gateway.audit_rows())


def test_prompts_follow_their_keys_retention_up_to_a_maximum(gateway: RunningGateway) -> None:
    long = {"role": "user", "content": "word " * 30_000, "images": ["A" * 5000]}
    with gateway.http(gateway.key(prompt_log=True, prompt_retention=timedelta(days=7))) as client:
        assert client.post("/api/chat", json={"model": MODEL, "messages": [long]}).status_code == 200
    until(lambda: prompts(gateway))
    (kept,) = prompts(gateway)
    assert kept["expires_at"] - kept["at"] == timedelta(days=7)
    assert kept["is_cut"] and len(kept["request"]) == len(kept["answer"]) == 65_536 and "AAAA" not in kept["request"]


def test_text_that_postgresql_cannot_store_is_replaced(gateway: RunningGateway) -> None:
    body = '{"model": "llama3.2", "messages": [{"role": "user", "content": "nul \\u0000 here"}]}'
    with gateway.http(gateway.key(prompt_log=True)) as client:
        assert client.post("/api/chat", content=body).status_code == 200
    until(lambda: prompts(gateway))
    assert "nul" in prompts(gateway)[0]["request"]


def test_forgotten_prompts_do_not_come_back(gateway: RunningGateway, stores: TestStores) -> None:
    """Also not one that was still on its way to the database."""
    with gateway.http(gateway.key(prompt_log=True)) as client, stores.client() as redis:
        redis.set("nz:audit:writer", "somebody else", px=2000)
        client.post("/api/chat", json=CHATS[0].body)
        assert sum(redis.xlen(shared.prompts) for shared in redis_keys.BY_SHARD) == 1

        async def forget() -> None:
            async with gateway.components.database.connection() as connection:
                await connection.execute("UPDATE keys SET prompts_forgotten_at = now()")

        gateway.call(forget())
        until(lambda: not any(redis.xlen(shared.prompts) for shared in redis_keys.BY_SHARD))
    assert prompts(gateway) == []


def test_a_prompt_that_is_not_text_is_refused_and_frees_its_slot(gateway: RunningGateway) -> None:
    key = gateway.key(prompt_log=True, concurrent=1)
    body = '{"model":"llama3.2","messages":[{"role":"user","content":"\\ud800 half a letter"}]}'
    with gateway.http(key, headers={"Content-Type": "application/json"}) as client:
        assert client.post("/v1/chat/completions", content=body).status_code == 400
        assert client.post("/v1/chat/completions", json=CHATS[2].body).status_code == 200
    assert gateway.components.limits.admitted == 0
    assert [row["outcome"] for row in gateway.audit_rows()] == ["refused:bad_request", "answered"]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/responses", "/api/chat"])
@pytest.mark.parametrize("depth", [190, 300, 900])
def test_a_prompt_is_kept_beside_a_deep_field_that_no_backend_gets(start_gateway: StartGateway, path: str, depth: int) -> None:
    """Otherwise a caller could ask without a trace."""
    with FakeBackend(kind="openai", models=[MODEL]) as backend:
        gateway = start_gateway(backend)
        asked = {"input": "the question"} if "resp" in path else {"messages": [{"role": "user", "content": "the question"}]}
        body = json.dumps({"model": MODEL, "max_tokens": 9, **asked})[:-1] + ',"x":' + "[" * depth + "]" * depth + "}"
        with gateway.http(gateway.key(prompt_log=True)) as client:
            assert client.post(path, content=body).status_code == 200
        until(lambda: prompts(gateway))
        (kept,) = prompts(gateway)
    assert "the question" in kept["request"] and kept["answer"]
