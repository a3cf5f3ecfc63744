"""One Redis connection shared by many requests: commands are pipelined, and each has a deadline."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import hiredis
from redis.asyncio import Redis

from gateway.core.background import KeptTask
from gateway.stores import redis_keys
from gateway.stores.redis_client import CALL_DEADLINE_S, CHECK_KEPT_MS, CONNECT_DEADLINE_S, FAILURES, RedisUnavailable, connect
from gateway.stores.redis_scripts import Script

LOG = logging.getLogger("gateway.store")
MOST_PENDING = 20_000
# A busy event loop must not pass for a frozen Redis: a late reply that has arrived gets some turns of the loop to be read.
LATE_CHECKS, LATE_CHECK_EVERY_S = 4, 0.003
RECONNECT_AFTER_S = 5.0
PAUSE_S = 0.2
LOG_REFUSALS_EVERY_S = 60.0
REFUSED = ("READONLY", "NOPERM")
WRITE_CHECK = "return redis.call('SET', KEYS[1], 1, 'PX', ARGV[1])"
# Errors of a cluster node about a key that it does not hold, or not yet, or that no node holds.
NOT_HELD = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")


def pack(*command: Any) -> bytes:
    packed: bytes = hiredis.pack_command(command)
    return packed


@dataclass
class CallCounts:
    """How many commands were sent to Redis, and how many failed."""

    calls: int = 0
    errors: int = 0


class Command(NamedTuple):
    packed: bytes
    reply: "asyncio.Future[Any]"
    deadline: float
    is_retry: bool


class RedisConnection:
    """`async with RedisConnection(…) as connection:` — `await connection.run("admit", keys, values)` runs a script.

    A command is written at once while no reply is outstanding, else together with the others of the same turn of the event
    loop; `flush` writes at once. A command without a reply after 50 ms fails with RedisUnavailable, and until all outstanding
    replies have arrived all others fail at once.
    """

    def __init__(
        self,
        url: str,
        scripts: Mapping[str, Script],
        counts: CallCounts,
        on_failure: Callable[[Exception], None],
        on_moved: Callable[[], None],
    ) -> None:
        self._client: Redis = connect(url, deadline_s=CONNECT_DEADLINE_S)
        self._scripts, self._counts = scripts, counts
        self._on_failure, self._on_moved = on_failure, on_moved
        self._transport: asyncio.WriteTransport | None = None
        self._unwritten: list[bytes] = []
        self._pending: deque[Command] = deque()
        self._takes_writes = self._is_late = False
        self._late_command: Command | None = None
        self._late_checks = 0
        self._refusal_logged_at = -LOG_REFUSALS_EVERY_S
        self._timer: asyncio.TimerHandle | None = None
        self._connected = asyncio.Event()
        self.background = KeptTask(self._keep_connected, "redis connection")

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self.background.start()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), CONNECT_DEADLINE_S)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.flush()
        await self.background.end()
        with suppress(*FAILURES):
            await asyncio.wait_for(self._client.aclose(), CONNECT_DEADLINE_S)

    @property
    def is_usable(self) -> bool:
        return self._takes_writes and not self._is_late and len(self._pending) < MOST_PENDING

    @property
    def has_written(self) -> bool:
        """Whether all commands have been written."""
        return not self._unwritten

    def run(self, script: str, keys: list[Any], values: list[Any]) -> "asyncio.Future[Any]":
        """The script's reply; raises RedisUnavailable, now or when awaited."""
        return self.send("EVALSHA", self._scripts[script].sha, len(keys), *keys, *values)

    def send(self, *arguments: Any) -> "asyncio.Future[Any]":
        if not self.is_usable:
            raise RedisUnavailable
        self._counts.calls += 1
        packed = pack(*arguments)
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._enqueue(Command(packed, reply, self._loop.time() + CALL_DEADLINE_S, False))
        if len(self._pending) == 1:
            self.flush()
        elif len(self._unwritten) == 1:
            self._loop.call_soon(self.flush)
        return reply

    def _enqueue(self, command: Command) -> None:
        self._unwritten.append(command.packed)
        self._pending.append(command)
        if self._timer is None:
            self._timer = self._loop.call_at(command.deadline, self._check_deadline)

    def flush(self) -> None:
        # What is not written because the connection is closing fails when it is closed.
        if self._unwritten and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def _check_deadline(self) -> None:
        """The reply to the oldest command may be late."""
        self._timer = None
        if not self._pending:
            return
        oldest = self._pending[0]
        late_s = self._loop.time() - oldest.deadline
        if late_s < 0:
            self._timer = self._loop.call_at(oldest.deadline, self._check_deadline)
        elif self._count_late_check(oldest) < LATE_CHECKS:
            self._timer = self._loop.call_later(LATE_CHECK_EVERY_S, self._check_deadline)
        elif late_s < RECONNECT_AFTER_S:
            self._fail_pending()
            self._timer = self._loop.call_later(RECONNECT_AFTER_S / 10, self._check_deadline)
        else:
            self._abort()

    def _count_late_check(self, oldest: Command) -> int:
        self._late_checks = self._late_checks + 1 if oldest is self._late_command else 0
        self._late_command = oldest
        return self._late_checks

    def _fail_pending(self) -> None:
        if not self._is_late:
            self._is_late = True
            self._on_failure(TimeoutError())
        for command in self._pending:
            self._fail(command)

    def _fail(self, command: Command) -> None:
        if not command.reply.done():
            self._counts.errors += 1
            command.reply.set_exception(RedisUnavailable())

    def _check_writes(self, deadline: float) -> None:
        """A server that accepts no writes is of no use, even if it answers."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        reply.add_done_callback(self._writes_checked)
        self._enqueue(Command(pack("EVAL", WRITE_CHECK, 1, redis_keys.CHECK, CHECK_KEPT_MS), reply, deadline, True))

    def _writes_checked(self, reply: "asyncio.Future[Any]") -> None:
        # Other errors may pass (out of memory, a key on another node): the next commands get them as their own replies.
        if not reply.cancelled():
            reply.exception()
        self._takes_writes = self._transport is not None and not self._transport.is_closing()
        self._connected.set()

    def _abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _keep_connected(self) -> None:
        while True:
            try:
                await self._use_one_connection()
            except FAILURES as error:
                self._on_failure(error)
            await asyncio.sleep(PAUSE_S)

    async def _use_one_connection(self) -> None:
        async with asyncio.timeout(CONNECT_DEADLINE_S * 2):
            connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        replies = Replies(self._take_reply)
        try:
            self._transport = _take_over(connection, replies)
            self._load_scripts(self._loop.time() + CONNECT_DEADLINE_S)
            self._check_writes(self._loop.time() + CONNECT_DEADLINE_S)
            self.flush()
            await replies.ended
        finally:
            self._transport = None
            self._takes_writes = False
            self._drop_all()
            with suppress(*FAILURES):
                await connection.disconnect(nowait=True)
                await self._client.connection_pool.release(connection)

    def _take_reply(self, reply: Any) -> None:
        command = self._pending.popleft()
        if not self._pending:
            self._is_late = False
        if isinstance(reply, hiredis.ReplyError):
            self._take_error(command, str(reply))
        elif not command.reply.done():
            command.reply.set_result(reply)

    def _take_error(self, command: Command, message: str) -> None:
        if message.startswith(REFUSED):
            # The server has become a replica, or our rights are too few; a new connection may find the primary, or more rights.
            self._takes_writes = False
            self._abort()
        if message.startswith(NOT_HELD):
            self._on_moved()
        if command.reply.done():
            return
        if message.startswith("NOSCRIPT") and not command.is_retry:
            self._retry_with_scripts(command)
        else:
            self._log_refusal(message)
            self._fail(command)

    def _log_refusal(self, message: str) -> None:
        """Once a minute: a Redis that is out of memory refuses every command."""
        now = self._loop.time()
        if not message.startswith(NOT_HELD) and now - self._refusal_logged_at > LOG_REFUSALS_EVERY_S:
            self._refusal_logged_at = now
            LOG.error("Redis refuses: %s", message)

    def _retry_with_scripts(self, command: Command) -> None:
        """Redis has lost the scripts: load them again. Replies come in order, so the scripts are there before the retry."""
        self._load_scripts(command.deadline)
        self._enqueue(command._replace(is_retry=True))
        self.flush()

    def _load_scripts(self, deadline: float) -> None:
        for script in self._scripts.values():
            self._enqueue(Command(pack("SCRIPT", "LOAD", script.text), self._ignored_reply(), deadline, True))

    def _ignored_reply(self) -> "asyncio.Future[Any]":
        reply: asyncio.Future[Any] = self._loop.create_future()
        reply.cancel()
        return reply

    def _drop_all(self) -> None:
        self._unwritten.clear()
        self._is_late = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._pending:
            self._fail(self._pending.popleft())


class Replies(asyncio.Protocol):
    """Hands over each reply as it arrives; `ended` is done when the connection has ended."""

    def __init__(self, take: Callable[[Any], None]) -> None:
        self._take = take
        self._reader = hiredis.Reader()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            if not isinstance(reply, hiredis.PushNotification):
                self._take(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        # Any error, also in the protocol, ends the connection; the next one is made by `_keep_connected`.
        if not self.ended.done():
            self.ended.set_exception(ConnectionResetError(str(exc or "closed by Redis")))


def _take_over(connection: Any, replies: Replies) -> asyncio.WriteTransport:
    """The transport of a connection made by the library, whose own way to send and read sets a timer for each command."""
    transport: asyncio.WriteTransport = connection._writer.transport  # noqa: SLF001
    transport.set_protocol(replies)
    return transport
