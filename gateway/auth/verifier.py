"""Argon2 off the loop: keys whose id exists have room of their own, whatever is sent with ids that nobody has."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from gateway.auth.key_format import PresentedKey
from gateway.core import background
from gateway.core.errors import Overloaded

THREADS = 2
# Waiting or under way: ids that exist, keys behind another one of their id, keys of one id, keys with ids that nobody has.
MOST_IDS, MOST_BEHIND, MOST_OF_ONE_ID, MOST_UNKNOWN = 256, 256, 32, 16
LONGEST_WAIT_S, LONGEST_REST_S = 10.0, 0.25


class Verdict(NamedTuple):
    is_right: bool
    took_s: float


class Verifier:
    """Of two threads, ids that nobody has take one, half of the time; those that exist are verified one at a time each.

    So of each id one at most waits for a thread, in the order of arrival, and those behind it take no room of other ids.

    A wrong key is answered in its turn among those with unknown ids and after as long, so that the time tells nobody
    which ids there are. Where that queue is full they can be told apart: unknown ids are turned away at once,
    a wrong key is verified, answered and counted.
    """

    def __init__(self, hasher: PasswordHasher) -> None:
        self._hasher = hasher
        self._decoy = hasher.hash("nobody's key")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="argon2")
        self._under_way: Counter[str] = Counter()
        self._locks: dict[str, asyncio.Lock] = {}
        self._lane = asyncio.Lock()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def is_right(self, stored: str | None, presented: PresentedKey) -> bool:
        """Whether this is the key whose hash is stored; `stored` is None where nobody has its id. Raises Overloaded."""
        if stored is None:
            await self._among_unknown(lambda: self._verify(self._decoy, presented.whole))
            return False
        verifying = asyncio.create_task(self._of_known(stored, presented))
        turn = asyncio.create_task(self._among_unknown(lambda: _as_long_as(verifying)))
        try:
            is_right, _ = await verifying
            if not is_right:
                # Without a turn it is as wrong: who sent it is counted, and argon2 does not run for it again.
                with suppress(Overloaded):
                    await turn
            return is_right
        finally:
            for task in (verifying, turn):
                task.cancel()
                task.add_done_callback(background.retrieve)

    async def _of_known(self, stored: str, presented: PresentedKey) -> Verdict:
        one_id = f"id {presented.secret_id}"
        room, most = ("behind", MOST_BEHIND) if one_id in self._under_way else ("ids", MOST_IDS)
        with self._counted(room, most), self._counted(one_id, MOST_OF_ONE_ID):
            lock = self._locks.setdefault(presented.secret_id, asyncio.Lock())
            try:
                async with lock:
                    began = time.monotonic()
                    is_right = await self._verify(stored, presented.whole)
                    return Verdict(is_right, time.monotonic() - began)
            finally:
                if self._under_way[one_id] == 1:
                    self._locks.pop(presented.secret_id, None)

    async def _among_unknown(self, work: Callable[[], Awaitable[object]]) -> None:
        """One after the other, and after each a rest of the same length, if that is short."""
        loop = asyncio.get_running_loop()
        with self._counted("unknown", MOST_UNKNOWN):
            try:
                # Not wait_for, whose cancellation may leave the lock taken by nobody.
                async with asyncio.timeout(LONGEST_WAIT_S):
                    await self._lane.acquire()
            except TimeoutError:
                raise Overloaded(retry_after=1) from None
            began = loop.time()
            try:
                await work()
            finally:
                loop.call_later(min(loop.time() - began, LONGEST_REST_S), self._lane.release)

    @contextmanager
    def _counted(self, what: str, most: int) -> Iterator[None]:
        if self._under_way[what] >= most:
            raise Overloaded(retry_after=1)
        self._under_way[what] += 1
        try:
            yield
        finally:
            self._under_way[what] -= 1
            if not self._under_way[what]:
                del self._under_way[what]

    async def _verify(self, stored: str, whole: str) -> bool:
        loop = asyncio.get_running_loop()
        with suppress(VerificationError, InvalidHashError):
            return await loop.run_in_executor(self._threads, self._hasher.verify, stored, whole)
        return False


async def _as_long_as(verifying: "asyncio.Task[Verdict]") -> None:
    """In place of a verification that has a thread of its own: as long as that one took, from now on."""
    began = time.monotonic()
    await asyncio.wait([verifying])
    await asyncio.sleep(verifying.result().took_s - (time.monotonic() - began))
