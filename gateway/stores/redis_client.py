"""Redis: one client whose every call has a deadline behind a breaker, and one subscription that reconnects."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Self
from urllib.parse import unquote

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import OutOfMemoryError, RedisClusterException, RedisError, ResponseError

from gateway.core.background import KeptTask
from gateway.stores import redis_keys, urls

LOG = logging.getLogger("gateway.store")
CALL_DEADLINE_S = 0.05
CONNECT_DEADLINE_S = 1.0
CHECK_EVERY_S = 1.0
CHECK_KEPT_MS = 60_000
PING_EVERY_S = 5.0
TIMEOUTS_UNTIL_AWAY = 2
# A cluster's own troubles are no RedisError to the library.
FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
SENTINEL: dict[str, Any] = {
    "socket_timeout": CONNECT_DEADLINE_S / 3,
    "socket_connect_timeout": CONNECT_DEADLINE_S / 3,
    "retry": Retry(NoBackoff(), 0),
}


class RedisUnavailable(Exception):
    """Redis does not answer, or has no room; go on without it."""

    is_full = False


def _full() -> RedisUnavailable:
    away = RedisUnavailable()
    away.is_full = True
    return away


def connect(url: str, *, deadline_s: float) -> Redis:
    """A client for redis://, rediss://, unix://, redis+sentinel://[user:password@]host:port[,host:port…]/master[/db] or
    redis+cluster://[user:password@]host:port[,host:port…]."""
    options: dict[str, Any] = {
        "socket_timeout": deadline_s,
        "socket_connect_timeout": CONNECT_DEADLINE_S,
        "retry": Retry(NoBackoff(), 0),
        "client_name": "neuronetz-gateway",
    }
    if is_cluster(url):
        found: Redis = _of_cluster(url, options)
        return found
    if "+sentinel" not in urls.split(url).scheme:
        return Redis.from_url(url, **options)
    return _through_sentinels(url, options)


def is_cluster(url: str) -> bool:
    return "+cluster" in urls.split(url).scheme


def of_node(url: str, host: str, port: int) -> str:
    """The URL of one node of a cluster, with the cluster's way to log in."""
    parts = urls.split(url)
    login, at, _ = parts.netloc.rpartition("@")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme.partition('+')[0]}://{login}{at}{shown}:{port}"


def _of_cluster(url: str, options: dict[str, Any]) -> Any:
    parts = urls.split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    nodes = [ClusterNode(*_host_and_port(host, "6379")) for host in hosts.split(",")]
    options = {**options, "ssl": parts.scheme.startswith("rediss")}
    login: dict[str, Any] = {"username": unquote(user) or None, "password": unquote(password) or None}
    return RedisCluster(startup_nodes=nodes, **login, **options)


def _through_sentinels(url: str, options: dict[str, Any]) -> Redis:
    parts = urls.split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    master, _, database = parts.path.strip("/").partition("/")
    sentinels = [_host_and_port(host) for host in hosts.split(",")]
    secure = {"ssl": True} if parts.scheme.startswith("rediss") else {}
    login: dict[str, Any] = {"username": unquote(user) or None, "password": unquote(password) or None}
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        sentinels, sentinel_kwargs=SENTINEL, **options, **secure
    )
    client: Redis = sentinel.master_for(master or "mymaster", db=int(database or 0), **login)
    return client


def _all_clients(client: Redis) -> list[Redis]:
    """A client through sentinels leaves those that it asked open."""
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    return [client, *(manager.sentinels if manager else ())]


def _host_and_port(text: str, standard: str = "26379") -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", standard)
    return host, int(port)


async def drop_names(url: str, prefix: str, is_meant: Callable[[str], bool], within_s: float) -> None:
    """Deletes what is meant of everything whose name begins so. Raises StoreAway, with some of it perhaps still there."""
    client = connect(url, deadline_s=CONNECT_DEADLINE_S)
    try:
        async with asyncio.timeout(within_s), client:
            async for name in client.scan_iter(match=f"{prefix}*", count=1000):
                if is_meant(name.decode(errors="replace")):
                    await client.unlink(name)
    except FAILURES as wrong:
        raise RedisUnavailable from wrong


class RedisClient:
    """`async with Store(url) as store:`; a call raises StoreAway at the latest after 50 ms, and at once while Redis is away."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.is_cluster = is_cluster(url)
        self._redis = connect(url, deadline_s=CALL_DEADLINE_S)
        self._subscriber = connect(url, deadline_s=PING_EVERY_S * 2)
        self._timeouts = 0
        self.calls = self.errors = 0
        self._look = asyncio.Event()
        self.background = [KeptTask(self._keep_checking, "redis health")]
        self.up = False
        self._told_up: bool | None = None
        # What Redis said, where it answers and refuses.
        self.refusal = ""

    async def __aenter__(self) -> Self:
        await self._check()
        self.background[0].start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(kept.end() for kept in self.background))
        for client in (*_all_clients(self._redis), *_all_clients(self._subscriber)):
            with contextlib.suppress(*FAILURES):
                await asyncio.wait_for(client.aclose(), CONNECT_DEADLINE_S)

    async def call(self, command: Callable[[Redis], Awaitable[Any]]) -> Any:
        if not self.up:
            raise RedisUnavailable
        self.calls += 1
        try:
            async with asyncio.timeout(CALL_DEADLINE_S):
                answer = await command(self._redis)
        except OutOfMemoryError as full:
            raise _full() from full
        except FAILURES as wrong:
            self.errors += 1
            self.count_failure(wrong)
            raise RedisUnavailable from wrong
        self._timeouts = 0
        return answer

    async def pipeline(self, fill: Callable[[Any], object]) -> list[Any]:
        async def run(redis: Redis) -> list[Any]:
            async with redis.pipeline(transaction=False) as pipe:
                fill(pipe)
                return await pipe.execute()

        answers: list[Any] = await self.call(run)
        return answers

    async def slow_pipeline(self, fill: Callable[[Any], object], deadline_s: float) -> list[Any]:
        async def run(redis: Redis) -> list[Any]:
            async with redis.pipeline(transaction=False) as pipe:
                fill(pipe)
                return await pipe.execute()

        answers: list[Any] = await self.slow_call(run, deadline_s)
        return answers

    async def slow_call(self, command: Callable[[Redis], Awaitable[Any]], deadline_s: float) -> Any:
        """For background work whose answers are large."""
        if not self.up:
            raise RedisUnavailable
        self.calls += 1
        try:
            async with asyncio.timeout(deadline_s):
                return await command(self._subscriber)
        except OutOfMemoryError as full:
            raise _full() from full
        except FAILURES as wrong:
            self.errors += 1
            self.count_failure(wrong)
            raise RedisUnavailable from wrong

    def count_failure(self, wrong: Exception) -> None:
        self._timeouts += 1
        if self._timeouts >= TIMEOUTS_UNTIL_AWAY:
            self._set_up(up=False, reason=type(wrong).__name__)
        self._look.set()

    def _set_up(self, *, up: bool, reason: str = "") -> None:
        self.up = up
        if up:
            self._timeouts = 0
        if self._told_up != up:
            self._told_up = up
            LOG.log(logging.INFO if up else logging.ERROR, "Redis %s", "answers" if up else f"is away: {reason}")

    async def _check(self) -> None:
        """A server that answers but takes nothing (a replica, names not allowed) is of no more use than none."""
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await self._redis.ping()
                with contextlib.suppress(OutOfMemoryError):  # without room it still counts, and says so where it matters
                    await self._redis.set(redis_keys.CHECK, b"1", px=CHECK_KEPT_MS)
        except FAILURES as wrong:
            self.refusal = f"{type(wrong).__name__}: {wrong}" if isinstance(wrong, ResponseError) else ""
            self._set_up(up=False, reason=type(wrong).__name__)
        else:
            self.refusal = ""
            self._set_up(up=True)

    async def _keep_checking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_EVERY_S):
                    await self._look.wait()
            self._look.clear()
            await self._check()
            await asyncio.sleep(0 if self.up else CHECK_EVERY_S / 5)

    def subscribe(self, handlers: Mapping[str, Callable[[str], None]], after_gap: Callable[[], None]) -> None:
        """Call the handler of a channel with each message; `after_gap` each time messages may have been missed."""
        self.background.append(
            KeptTask(partial(self._listen, handlers, after_gap), f"redis subscription to {' '.join(handlers)}")
        )
        self.background[-1].start()

    async def _listen(self, handlers: Mapping[str, Callable[[str], None]], after_gap: Callable[[], None]) -> None:
        while True:
            try:
                async with self._subscription(tuple(handlers)) as messages:
                    after_gap()
                    async for channel, text in messages:
                        handlers[channel](text)
            except FAILURES:
                LOG.debug("the subscription ended, subscribing again")
            except Exception:
                LOG.exception("a message could not be handled, subscribing again")
            await asyncio.sleep(CHECK_EVERY_S / 2)

    @asynccontextmanager
    async def _subscription(self, channels: tuple[str, ...]) -> AsyncIterator[AsyncIterator[tuple[str, str]]]:
        async with self._listening_post() as client:
            subscription = client.pubsub()
            try:
                await subscription.subscribe(*channels)
                yield self._messages(subscription)
            finally:
                await subscription.aclose()  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def _listening_post(self) -> AsyncIterator[Redis]:
        """The nodes of a cluster tell each other all messages: any of them will do."""
        if not is_cluster(self._url):
            yield self._subscriber
            return
        cluster: Any = self._subscriber
        await cluster.initialize()
        node = cluster.get_random_node()
        async with connect(of_node(self._url, node.host, node.port), deadline_s=PING_EVERY_S * 2) as client:
            yield client

    @staticmethod
    async def _messages(subscription: Any) -> AsyncIterator[tuple[str, str]]:
        while True:
            message = await subscription.get_message(timeout=PING_EVERY_S)
            if message is None:
                # A frozen server would otherwise look like a quiet one.
                await subscription.ping()
            elif message["type"] == "message":
                yield message["channel"].decode(), message["data"].decode(errors="replace")
