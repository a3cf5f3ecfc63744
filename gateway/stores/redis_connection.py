"""One connection to Redis that many requests share: written in order, answered in order, never waited for too long."""

import asyncio
import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import hiredis
from redis.asyncio import Redis

from gateway.core.background import KeptTask
from gateway.stores import redis_keys
from gateway.stores.redis_client import CALL_DEADLINE_S, CHECK_KEPT_MS, CONNECT_DEADLINE_S, FAILURES, RedisUnavailable, connect

LOG = logging.getLogger("gateway.store")
MOST_PENDING = 20_000
# A busy loop of our own must not pass for a frozen Redis: answers that have arrived get this long to be read.
LOOKS, LOOK_AGAIN_S = 4, 0.003
GIVE_UP_S = 5.0
PAUSE_S = 0.2
COMPLAIN_EVERY_S = 60.0
REFUSED = ("READONLY", "NOPERM")
WRITES = "return redis.call('SET', KEYS[1], 1, 'PX', ARGV[1])"
# What a node of a cluster says of a key that it does not hold, or not yet, or that nobody holds.
NOT_HERE = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")


def pack(*command: Any) -> bytes:
    packed: bytes = hiredis.pack_command(command)
    return packed


@dataclass
class Tally:
    """How often Redis was asked, and how often it did not answer as it should."""

    calls: int = 0
    errors: int = 0


class Sent(NamedTuple):
    answer: "asyncio.Future[Any]"
    command: bytes
    due: float
    is_second_try: bool


class Script(NamedTuple):
    sha: str
    text: str


def read_scripts(*folders: Path) -> dict[str, Script]:
    """All Lua scripts of the folders by name; each begins with the `common.lua` of its folder."""
    return {name: script for folder in folders for name, script in _scripts_in(folder)}


def _scripts_in(folder: Path) -> Iterator[tuple[str, Script]]:
    texts = {
        path.stem: path.read_text(encoding="utf-8").replace("nz:slots", redis_keys.SLOT_FREED)
        for path in sorted(folder.glob("*.lua"))
    }
    common = texts.pop("common", "")
    for name, text in texts.items():
        whole = common + text
        yield name, Script(hashlib.sha1(whole.encode(), usedforsecurity=False).hexdigest(), whole)


class RedisConnection:
    """`async with RedisConnection(…) as connection:` — `await connection.run("admit", keys, values)` runs a script.

    A command is written at once while Redis has nothing to do for us, else together with the others of the same turn of the
    loop; `flush` writes at once. An answer that is not there after 50 ms fails with StoreAway, and until Redis has caught up
    everything else fails at once.
    """

    def __init__(
        self,
        url: str,
        scripts: Mapping[str, Script],
        on_failure: Callable[[Exception], None],
        on_moved: Callable[[], None] = lambda: None,
        tally: Tally | None = None,
    ) -> None:
        self._tally = tally or Tally()
        self._client: Redis = connect(url, deadline_s=CONNECT_DEADLINE_S)
        self._on_failure, self._on_moved = on_failure, on_moved
        self._scripts = scripts
        self._transport: asyncio.WriteTransport | None = None
        self._unwritten: list[bytes] = []
        self._pending: deque[Sent] = deque()
        self._takes_writes = self._is_late = False
        self._suspect: Sent | None = None
        self._looks = 0
        self._complained_at = -COMPLAIN_EVERY_S
        self._watch: asyncio.TimerHandle | None = None
        self._connected = asyncio.Event()
        self.background = KeptTask(self._keep, "redis line")

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
        """Whether all that was sent is on its way."""
        return not self._unwritten

    @property
    def pending(self) -> int:
        return len(self._pending)

    def run(self, script: str, keys: list[Any], values: list[Any]) -> "asyncio.Future[Any]":
        """The script's answer; raises StoreAway, now or when awaited."""
        return self.send("EVALSHA", self._scripts[script].sha, len(keys), *keys, *values)

    def send(self, *command: Any) -> "asyncio.Future[Any]":
        if not self.is_usable:
            raise RedisUnavailable
        self._tally.calls += 1
        packed = pack(*command)
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._enqueue(Sent(answer, packed, self._loop.time() + CALL_DEADLINE_S, False))
        if len(self._pending) == 1:
            self.flush()
        elif len(self._unwritten) == 1:
            self._loop.call_soon(self.flush)
        return answer

    def _enqueue(self, sent: Sent) -> None:
        self._unwritten.append(sent.command)
        self._pending.append(sent)
        if self._watch is None:
            self._watch = self._loop.call_at(sent.due, self._look)

    def flush(self) -> None:
        # What a closing connection would have carried fails when it is closed.
        if self._unwritten and self._transport is not None and not self._transport.is_closing():
            self._transport.write(b"".join(self._unwritten))
        self._unwritten.clear()

    def _look(self) -> None:
        """The oldest answer may be due by now."""
        self._watch = None
        if not self._pending:
            return
        oldest = self._pending[0]
        overdue = self._loop.time() - oldest.due
        if overdue < 0:
            self._watch = self._loop.call_at(oldest.due, self._look)
        elif self._looked_again(oldest) < LOOKS:
            self._watch = self._loop.call_later(LOOK_AGAIN_S, self._look)
        elif overdue < GIVE_UP_S:
            self._fall_behind()
            self._watch = self._loop.call_later(GIVE_UP_S / 10, self._look)
        else:
            self._hang_up()

    def _looked_again(self, oldest: Sent) -> int:
        self._looks = self._looks + 1 if oldest is self._suspect else 0
        self._suspect = oldest
        return self._looks

    def _fall_behind(self) -> None:
        if not self._is_late:
            self._is_late = True
            self._on_failure(TimeoutError())
        for sent in self._pending:
            self._fail(sent)

    def _fail(self, sent: Sent) -> None:
        if not sent.answer.done():
            self._tally.errors += 1
            sent.answer.set_exception(RedisUnavailable())

    def _try_to_write(self, due: float) -> None:
        """What takes nothing is of no use, however well it answers."""
        answer: asyncio.Future[Any] = self._loop.create_future()
        answer.add_done_callback(self._tried)
        self._enqueue(Sent(answer, pack("EVAL", WRITES, 1, redis_keys.CHECK, CHECK_KEPT_MS), due, True))

    def _tried(self, answer: "asyncio.Future[Any]") -> None:
        # Other errors are of the moment (no room, not this node's), and answered as such by each command.
        if not answer.cancelled():
            answer.exception()
        self._takes_writes = self._transport is not None and not self._transport.is_closing()
        self._connected.set()

    def _hang_up(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _keep(self) -> None:
        while True:
            try:
                await self._use_one_connection()
            except FAILURES as wrong:
                self._on_failure(wrong)
            await asyncio.sleep(PAUSE_S)

    async def _use_one_connection(self) -> None:
        async with asyncio.timeout(CONNECT_DEADLINE_S * 2):
            connection = await self._client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        replies = Replies(self._take)
        try:
            self._transport = _taken_over(connection, replies)
            self._load_scripts(self._loop.time() + CONNECT_DEADLINE_S)
            self._try_to_write(self._loop.time() + CONNECT_DEADLINE_S)
            self.flush()
            await replies.ended
        finally:
            self._transport = None
            self._takes_writes = False
            self._drop_all()
            with suppress(*FAILURES):
                await connection.disconnect(nowait=True)
                await self._client.connection_pool.release(connection)

    def _take(self, reply: Any) -> None:
        sent = self._pending.popleft()
        if not self._pending:
            self._is_late = False
        if isinstance(reply, hiredis.ReplyError):
            self._take_error(sent, str(reply))
        elif not sent.answer.done():
            sent.answer.set_result(reply)

    def _take_error(self, sent: Sent, told: str) -> None:
        if told.startswith(REFUSED):
            # What was the primary is none any more, or we may not: another connection may find another server, or more rights.
            self._takes_writes = False
            self._hang_up()
        if told.startswith(NOT_HERE):
            self._on_moved()
        if sent.answer.done():
            return
        if told.startswith("NOSCRIPT") and not sent.is_second_try:
            self._try_again(sent)
        else:
            self._complain(told)
            self._fail(sent)

    def _complain(self, told: str) -> None:
        """Once a minute: a Redis without room says so to every command."""
        now = self._loop.time()
        if not told.startswith(NOT_HERE) and now - self._complained_at > COMPLAIN_EVERY_S:
            self._complained_at = now
            LOG.error("Redis refuses: %s", told)

    def _try_again(self, sent: Sent) -> None:
        """Somebody has emptied Redis's memory of scripts. Their answers come first, after those under way."""
        self._load_scripts(sent.due)
        self._enqueue(sent._replace(is_second_try=True))
        self.flush()

    def _load_scripts(self, due: float) -> None:
        for script in self._scripts.values():
            self._enqueue(Sent(self._forgotten(), pack("SCRIPT", "LOAD", script.text), due, True))

    def _forgotten(self) -> "asyncio.Future[Any]":
        answer: asyncio.Future[Any] = self._loop.create_future()
        answer.cancel()
        return answer

    def _drop_all(self) -> None:
        self._unwritten.clear()
        self._is_late = False
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        while self._pending:
            self._fail(self._pending.popleft())


class Replies(asyncio.Protocol):
    """Hands over each reply as it comes; `ended` is done when the connection is."""

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
        # Whatever broke it, an answer that is none of the protocol too: the line begins anew.
        if not self.ended.done():
            self.ended.set_exception(ConnectionResetError(str(exc or "closed by Redis")))


def _taken_over(connection: Any, replies: Replies) -> asyncio.WriteTransport:
    """The transport of a connection that the library has made; its own way to send and read waits and sets timers each time."""
    transport: asyncio.WriteTransport = connection._writer.transport  # noqa: SLF001
    transport.set_protocol(replies)
    return transport
