"""A Redis client whose calls have deadlines and fail at once while Redis is unavailable, and subscriptions that reconnect."""

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
FAILURES_UNTIL_DOWN = 2
# In the library, errors of a cluster as a whole are no RedisError.
FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)
SENTINEL: dict[str, Any] = {
    "socket_timeout": CONNECT_DEADLINE_S / 3,
    "socket_connect_timeout": CONNECT_DEADLINE_S / 3,
    "retry": Retry(NoBackoff(), 0),
}


class RedisUnavailable(Exception):
    """Redis does not answer, or is out of memory; the caller continues without it."""

    is_full = False


def _out_of_memory() -> RedisUnavailable:
    error = RedisUnavailable()
    error.is_full = True
    return error


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
        cluster: Redis = _cluster_client(url, options)
        return cluster
    if "+sentinel" not in urls.split(url).scheme:
        return Redis.from_url(url, **options)
    return _sentinel_client(url, options)


def is_cluster(url: str) -> bool:
    return "+cluster" in urls.split(url).scheme


def node_url(url: str, host: str, port: int) -> str:
    """The URL of one node of a cluster, with the cluster's credentials."""
    parts = urls.split(url)
    login, at, _ = parts.netloc.rpartition("@")
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme.partition('+')[0]}://{login}{at}{shown}:{port}"


def _cluster_client(url: str, options: dict[str, Any]) -> Any:
    parts = urls.split(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    nodes = [ClusterNode(*_host_and_port(host, "6379")) for host in hosts.split(",")]
    options = {**options, "ssl": parts.scheme.startswith("rediss")}
    login: dict[str, Any] = {"username": unquote(user) or None, "password": unquote(password) or None}
    return RedisCluster(startup_nodes=nodes, **login, **options)


def _sentinel_client(url: str, options: dict[str, Any]) -> Redis:
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
    """A client through sentinels does not close its clients of the sentinels."""
    manager = getattr(getattr(client, "connection_pool", None), "sentinel_manager", None)
    return [client, *(manager.sentinels if manager else ())]


def _host_and_port(text: str, default_port: str = "26379") -> tuple[str, int]:
    host, _, port = text.rpartition(":") if ":" in text else (text, "", default_port)
    return host, int(port)


async def delete_names(url: str, prefix: str, is_wanted: Callable[[str], bool], within_s: float) -> None:
    """Deletes the wanted ones of all names with this prefix. Raises RedisUnavailable; some may then still be there."""
    client = connect(url, deadline_s=CONNECT_DEADLINE_S)
    try:
        async with asyncio.timeout(within_s), client:
            async for name in client.scan_iter(match=f"{prefix}*", count=1000):
                if is_wanted(name.decode(errors="replace")):
                    await client.unlink(name)
    except FAILURES as error:
        raise RedisUnavailable from error


class RedisClient:
    """`async with RedisClient(url) as store:`; a call raises RedisUnavailable within 50 ms, or at once after two failures."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.is_cluster = is_cluster(url)
        self._redis = connect(url, deadline_s=CALL_DEADLINE_S)
        self._subscriber = connect(url, deadline_s=PING_EVERY_S * 2)
        self._failures = 0
        self.calls = self.errors = 0
        self._check_soon = asyncio.Event()
        self.background = [KeptTask(self._keep_checking, "redis health")]
        self.up = False
        self._logged_up: bool | None = None
        # The error message of a Redis that answers but refuses writes.
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
        except OutOfMemoryError as error:
            raise _out_of_memory() from error
        except FAILURES as error:
            self.errors += 1
            self.count_failure(error)
            raise RedisUnavailable from error
        self._failures = 0
        return answer

    async def pipeline(self, fill: Callable[[Any], object]) -> list[Any]:
        answers: list[Any] = await self.call(_pipelined(fill))
        return answers

    async def slow_pipeline(self, fill: Callable[[Any], object], deadline_s: float) -> list[Any]:
        answers: list[Any] = await self.slow_call(_pipelined(fill), deadline_s)
        return answers

    async def slow_call(self, command: Callable[[Redis], Awaitable[Any]], deadline_s: float) -> Any:
        """For background work with large answers."""
        if not self.up:
            raise RedisUnavailable
        self.calls += 1
        try:
            async with asyncio.timeout(deadline_s):
                return await command(self._subscriber)
        except OutOfMemoryError as error:
            raise _out_of_memory() from error
        except FAILURES as error:
            self.errors += 1
            self.count_failure(error)
            raise RedisUnavailable from error

    def count_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures >= FAILURES_UNTIL_DOWN:
            self._set_up(up=False, reason=type(error).__name__)
        self._check_soon.set()

    def _set_up(self, *, up: bool, reason: str = "") -> None:
        self.up = up
        if up:
            self._failures = 0
        if self._logged_up != up:
            self._logged_up = up
            LOG.log(logging.INFO if up else logging.ERROR, "Redis %s", "answers" if up else f"is unreachable: {reason}")

    async def _check(self) -> None:
        """A server that answers but takes no writes (a replica, missing rights) counts as unavailable."""
        try:
            async with asyncio.timeout(CONNECT_DEADLINE_S):
                await self._redis.ping()
                with contextlib.suppress(OutOfMemoryError):  # scripts still run; the calls that need memory fail by themselves
                    await self._redis.set(redis_keys.CHECK, b"1", px=CHECK_KEPT_MS)
        except FAILURES as error:
            self.refusal = f"{type(error).__name__}: {error}" if isinstance(error, ResponseError) else ""
            self._set_up(up=False, reason=type(error).__name__)
        else:
            self.refusal = ""
            self._set_up(up=True)

    async def _keep_checking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CHECK_EVERY_S):
                    await self._check_soon.wait()
            self._check_soon.clear()
            await self._check()
            await asyncio.sleep(0 if self.up else CHECK_EVERY_S / 5)

    def subscribe(self, handlers: Mapping[str, Callable[[str], None]], after_gap: Callable[[], None]) -> None:
        """Calls the handler of a channel with each message, and `after_gap` whenever messages may have been missed."""
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
        async with self._subscription_client() as client:
            subscription = client.pubsub()
            try:
                await subscription.subscribe(*channels)
                yield self._messages(subscription)
            finally:
                await subscription.aclose()  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def _subscription_client(self) -> AsyncIterator[Redis]:
        """In a cluster every node gets all messages, so any node will do."""
        if not is_cluster(self._url):
            yield self._subscriber
            return
        cluster: Any = self._subscriber
        await cluster.initialize()
        node = cluster.get_random_node()
        async with connect(node_url(self._url, node.host, node.port), deadline_s=PING_EVERY_S * 2) as client:
            yield client

    @staticmethod
    async def _messages(subscription: Any) -> AsyncIterator[tuple[str, str]]:
        while True:
            message = await subscription.get_message(timeout=PING_EVERY_S)
            if message is None:
                # Without messages, only a ping shows that the server is frozen.
                await subscription.ping()
            elif message["type"] == "message":
                yield message["channel"].decode(), message["data"].decode(errors="replace")


def _pipelined(fill: Callable[[Any], object]) -> Callable[[Redis], Awaitable[list[Any]]]:
    async def run(redis: Redis) -> list[Any]:
        async with redis.pipeline(transaction=False) as pipe:
            fill(pipe)
            answers: list[Any] = await pipe.execute()
            return answers

    return run
