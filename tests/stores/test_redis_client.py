"""The Redis client: each kind of URL, a frozen server, and subscriptions after a lost connection."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import redis

from gateway.stores.redis_client import CALL_DEADLINE_S, RedisClient, RedisUnavailable
from tests.conftest import TestStores
from tests.support.redis_server import server


async def set_and_get(url: str) -> bytes:
    async with RedisClient(url) as store:
        async with asyncio.timeout(20):
            while not store.up:  # noqa: ASYNC110 # the client checks Redis on its own
                await asyncio.sleep(0.05)
        await store.call(lambda client: client.set("name", "value"))
        found: bytes = await store.call(lambda client: client.get("name"))
        return found


def test_a_socket_and_a_port_with_a_password(stores: TestStores, tmp_path: Path) -> None:
    assert asyncio.run(set_and_get(stores.redis_url)) == b"value"
    with server(tmp_path, "requirepass secret%word") as (_, port):
        assert asyncio.run(set_and_get(f"redis://:secret%25word@127.0.0.1:{port}/0")) == b"value"


def test_a_client_that_connects_through_sentinels(tmp_path: Path) -> None:
    with server(tmp_path, "requirepass hidden-word") as (_, master):
        configuration = (f"sentinel monitor main 127.0.0.1 {master} 1", "sentinel auth-pass main hidden-word")
        with server(tmp_path, *configuration, sentinel=True) as (_, port):
            url = f"redis+sentinel://:hidden-word@127.0.0.1:1,127.0.0.1:{port}/main/2"
            assert asyncio.run(set_and_get(url)) == b"value"
        with redis.Redis(port=master, db=2, password="hidden-word") as client:
            assert client.get("name") == b"value"


async def freeze_and_thaw(url: str, process: subprocess.Popen[bytes]) -> tuple[list[float], bool]:
    async with RedisClient(url) as store:
        os.kill(process.pid, signal.SIGSTOP)
        waits = []
        for _ in range(20):
            began = time.perf_counter()
            with pytest.raises(RedisUnavailable):
                await store.call(lambda client: client.get("name"))
            waits.append(time.perf_counter() - began)
        os.kill(process.pid, signal.SIGCONT)
        for _ in range(100):
            if store.up:
                break
            await asyncio.sleep(0.05)
        return waits, store.up


def test_a_frozen_redis_delays_no_caller_and_is_used_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with server(tmp_path) as (process, port), caplog.at_level("INFO", "gateway.store"):
        waits, is_back = asyncio.run(freeze_and_thaw(f"redis://127.0.0.1:{port}/0", process))
    assert is_back
    assert max(waits) < CALL_DEADLINE_S + 1.0
    assert sorted(waits)[10] < CALL_DEADLINE_S / 2, "after the first failures calls fail at once"
    messages = [record.getMessage() for record in caplog.records if record.name == "gateway.store"]
    assert len(messages) == 3 and messages[0] == messages[2] == "Redis answers" and "unreachable" in messages[1]


def test_messages_arrive_again_after_the_connection_was_lost(tmp_path: Path) -> None:
    async def run() -> tuple[list[str], int]:
        received: list[str] = []
        gaps: list[int] = []

        async def wait_for(count: int, items: Sequence[object]) -> None:
            for _ in range(500):
                if len(items) >= count:
                    return
                await asyncio.sleep(0.01)

        with server(tmp_path) as (_, port):
            async with RedisClient(f"redis://127.0.0.1:{port}/0") as store:
                store.subscribe({"news": received.append}, after_gap=lambda: gaps.append(1))
                await wait_for(1, gaps)
                await store.call(lambda client: client.publish("news", "one"))
                await store.call(lambda client: client.client_kill_filter(_type="pubsub"))
                await wait_for(2, gaps)
                await store.call(lambda client: client.publish("news", "two"))
                await wait_for(2, received)
        return received, len(gaps)

    assert asyncio.run(asyncio.wait_for(run(), 20)) == (["one", "two"], 2)
