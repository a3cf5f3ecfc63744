"""A Redis cluster of three nodes: a key's state is on one node, and every request is counted, also while slots move."""

import asyncio
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from gateway.auth.key_format import parse
from gateway.stores import redis_keys
from tests.conftest import TestStores
from tests.support.chat_requests import CHATS
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import settings_for
from tests.support.processes import until
from tests.support.random_clients import RandomClients, run_clients
from tests.support.redis_cluster import NODES, SLOTS, move_slot, redis_cluster, url_of
from tests.support.running_gateway import RunningGateway

HELD = re.compile(r"nz:\{\d+\}:(c|v|q|calls|leases)(:|$)")


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture
def nodes(ports: list[int]) -> Iterator[list[Any]]:
    clients = [redis.Redis(port=port) for port in ports]
    for client in clients:
        client.flushall()
    yield clients
    for client in clients:
        client.close()


@pytest.fixture
def gateway(nodes: list[Any], ports: list[int], stores: TestStores, alpha: FakeBackend) -> Iterator[RunningGateway]:
    alpha.healthy.pieces, alpha.healthy.pause_s = 4, 0.002
    settings = settings_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=url_of(ports))
    with RunningGateway(settings) as running:
        yield running


def names(nodes: list[Any]) -> list[list[str]]:
    return [sorted(name.decode() for name in node.scan_iter("nz:*")) for node in nodes]


def node_of(shard: int) -> int:
    return int(key_slot(redis_keys.BY_SHARD[shard].calls) * NODES // SLOTS)


def key_on(gateway: RunningGateway, node: int, **limits: Any) -> str:
    for _ in range(100):
        key = gateway.key(**limits)
        parsed = parse(key)
        assert parsed is not None
        row = gateway.call(gateway.components.database.row("find_secret", parsed.secret_id))
        if row is not None and node_of(redis_keys.shard_of(row["id"])) == node:
            return key
    raise AssertionError("no key has its shard on this node")


def ask(gateway: RunningGateway, key: str) -> int:
    with gateway.http(key) as client:
        return client.post(CHATS[0].path, json=CHATS[0].body).status_code


def clients_of(gateway: RunningGateway, requests: int) -> RandomClients:
    clients = RandomClients(gateway.key(day=10**12), random.Random(5))
    asyncio.run(run_clients(clients, [gateway.url], requests, 30))
    gateway.wait_idle(20)
    return clients


def test_the_shards_are_spread_over_the_nodes_and_a_key_is_on_one_node(gateway: RunningGateway, nodes: list[Any]) -> None:
    assert {node_of(shard) for shard in range(redis_keys.SHARDS)} == set(range(NODES))
    key = gateway.key(rpm=1000, tpm=10_000, day=10_000)
    # The first call may come before the connection to the node: try again, as a client would.
    until(lambda: ask(gateway, key) == 200, 10)
    gateway.audit_rows()
    homes = [n for n, found in enumerate(names(nodes)) if any(":w:" in name for name in found)]
    assert len(homes) == 1
    assert all(any(f":{kind}:" in name for name in names(nodes)[homes[0]]) for kind in "wtb")


def test_every_request_is_counted_and_has_one_row(gateway: RunningGateway, nodes: list[Any]) -> None:
    clients = clients_of(gateway, 400)
    rows = gateway.audit_rows()
    assert len(rows) == clients.sent == 400 == len({row["id"] for row in rows})
    assert [name for found in names(nodes) for name in found if HELD.match(name)] == []
    days = [node.hgetall(name) for node, found in zip(nodes, names(nodes), strict=True) for name in found if ":b:" in name]
    settled = sum(int(count) for day in days for field, count in day.items() if field.startswith(b"d"))
    assert settled == sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows) > 0


def test_a_changed_limit_applies_within_a_second(gateway: RunningGateway) -> None:
    key = gateway.key(name="mine", rpm=1000)
    assert ask(gateway, key) == 200
    gateway.call(gateway.key_store().limit("mine", "", {"rpm": 1}))
    until(lambda: ask(gateway, key) == 429, 1.5)


def test_every_request_has_one_row_while_slots_move(gateway: RunningGateway, nodes: list[Any]) -> None:
    stopping = threading.Event()
    slots = sorted({key_slot(shared.calls) for shared in redis_keys.BY_SHARD})

    def move() -> None:
        for turn, slot in enumerate(slots):
            if not stopping.is_set():
                move_slot(nodes, slot, turn % NODES)
                time.sleep(0.05)

    mover = threading.Thread(target=move)
    mover.start()
    clients = clients_of(gateway, 600)
    stopping.set()
    mover.join(30)
    rows = gateway.audit_rows()
    assert len(rows) == clients.sent == len({row["id"] for row in rows})
    until(lambda: gateway.components.limits.is_usable, 10)
    assert ask(gateway, gateway.key()) == 200


def test_a_frozen_node_concerns_only_its_own_keys(gateway: RunningGateway, nodes: list[Any]) -> None:
    frozen, other = key_on(gateway, 0, rpm=20), key_on(gateway, 1, rpm=20)
    assert [ask(gateway, key) for key in (frozen, other)] == [200, 200]
    process = int(nodes[0].info("server")["process_id"])
    os.kill(process, signal.SIGSTOP)
    try:
        assert [ask(gateway, other) for _ in range(21)].count(200) == 19
        assert [ask(gateway, frozen) for _ in range(21)].count(200) in (19, 20)
    finally:
        os.kill(process, signal.SIGCONT)
    until(lambda: gateway.components.limits.is_usable and gateway.components.store.up, 15)
    assert len(gateway.audit_rows()) == 44
