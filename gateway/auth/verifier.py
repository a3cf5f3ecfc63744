"""Verifies keys with argon2 in threads; keys with unknown ids have a queue of their own and do not delay the others."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from gateway.auth.active_counts import ActiveCounts
from gateway.auth.key_format import PresentedKey
from gateway.core import background
from gateway.core.errors import Overloaded

THREADS = 2
# Limits on verifications in progress: known ids, keys queued behind another with the same id, keys of one id, unknown ids.
MOST_IDS, MOST_QUEUED, MOST_OF_ONE_ID, MOST_UNKNOWN = 256, 256, 32, 16
LONGEST_WAIT_S, LONGEST_PAUSE_S = 10.0, 0.25


class Verification(NamedTuple):
    is_right: bool
    took_s: float


class Verifier:
    """Keys with unknown ids use at most one of the two threads, and that for at most half of the time. Keys with the same known
    id are verified one at a time, so that each id has at most one key waiting for a thread.

    A key with a known id also takes a place in the queue of the unknown ids. If it is wrong, its answer waits for that place,
    and takes as long there, so that response times do not reveal which ids exist. One exception: while that queue is full,
    a key with an unknown id is refused at once, and a key with a known id only after its verification.
    """

    def __init__(self, hasher: PasswordHasher) -> None:
        self._hasher = hasher
        self._decoy = hasher.hash("nobody's key")
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="argon2")
        self._in_progress = ActiveCounts()
        self._locks: dict[str, asyncio.Lock] = {}
        self._unknown_lock = asyncio.Lock()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def is_right(self, stored: str | None, presented: PresentedKey) -> bool:
        """Whether the key matches the stored hash; `stored` is None if its id is unknown. Raises Overloaded."""
        if stored is None:
            await self._queue_as_unknown(lambda: self._verify(self._decoy, presented.whole))
            return False
        verifying = asyncio.create_task(self._verify_known(stored, presented))
        queued = asyncio.create_task(self._queue_as_unknown(lambda: _take_as_long(verifying)))
        try:
            is_right, _ = await verifying
            if not is_right:
                # Even if the queue is full, the key is wrong: it counts as a failure, and argon2 does not run for it again.
                with suppress(Overloaded):
                    await queued
            return is_right
        finally:
            for task in (verifying, queued):
                task.cancel()
                task.add_done_callback(background.retrieve)

    async def _verify_known(self, stored: str, presented: PresentedKey) -> Verification:
        one_id = f"id {presented.secret_id}"
        name, most = ("queued", MOST_QUEUED) if one_id in self._in_progress else ("ids", MOST_IDS)
        with self._limited(name, most), self._limited(one_id, MOST_OF_ONE_ID):
            lock = self._locks.setdefault(presented.secret_id, asyncio.Lock())
            try:
                async with lock:
                    began = time.monotonic()
                    is_right = await self._verify(stored, presented.whole)
                    return Verification(is_right, time.monotonic() - began)
            finally:
                if self._in_progress[one_id] == 1:
                    self._locks.pop(presented.secret_id, None)

    async def _queue_as_unknown(self, work: Callable[[], Awaitable[object]]) -> None:
        """One at a time, each followed by a pause of the same length, at most LONGEST_PAUSE_S."""
        loop = asyncio.get_running_loop()
        with self._limited("unknown", MOST_UNKNOWN):
            try:
                # Not wait_for: if it is cancelled, the lock may stay acquired without an owner.
                async with asyncio.timeout(LONGEST_WAIT_S):
                    await self._unknown_lock.acquire()
            except TimeoutError:
                raise Overloaded(retry_after=1) from None
            began = loop.time()
            try:
                await work()
            finally:
                loop.call_later(min(loop.time() - began, LONGEST_PAUSE_S), self._unknown_lock.release)

    @contextmanager
    def _limited(self, name: str, most: int) -> Iterator[None]:
        if self._in_progress[name] >= most:
            raise Overloaded(retry_after=1)
        with self._in_progress.counting(name):
            yield

    async def _verify(self, stored: str, whole: str) -> bool:
        loop = asyncio.get_running_loop()
        with suppress(VerificationError, InvalidHashError):
            return await loop.run_in_executor(self._threads, self._hasher.verify, stored, whole)
        return False


async def _take_as_long(verifying: "asyncio.Task[Verification]") -> None:
    """Waits, from now on, as long as the verification in another thread has taken."""
    began = time.monotonic()
    await asyncio.wait([verifying])
    await asyncio.sleep(verifying.result().took_s - (time.monotonic() - began))
