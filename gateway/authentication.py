"""Is this key one of ours: remembered by digest, verified by argon2 off the loop, bounded, one at a time per key."""

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from gateway import api_key, strict_json, tasks
from gateway.api_key import PresentedKey
from gateway.auth_failures import AuthFailures
from gateway.database import Database
from gateway.errors import Overloaded, StoreUnavailable, WrongKey
from gateway.keys import CHANGED, Key, cache_key, unpack
from gateway.store import Store, StoreAway

REMEMBERED = 10_000
WAITING_VERIFICATIONS = 64
KNOWN_KEY_WITHOUT_DATABASE_S = 900.0
NOTE_USE_EVERY_S = 20.0


@dataclass(frozen=True)
class Verified:
    """A key that argon2 has accepted, the hash that did, and until when nobody has to be asked again."""

    key: Key
    hash: str
    checked_at: float


class Authenticator:
    """`async with Authenticator(...)`: finds the key of a caller.

    A verified digest is trusted for `cache_s`; then the row is read again, without argon2 while its hash is the same. With
    PostgreSQL away it stays good for a quarter of an hour after its last check; unknown keys get 503.
    """

    def __init__(
        self, database: Database, store: Store, hasher: PasswordHasher, failures: AuthFailures, *, cache_s: float
    ) -> None:
        self._database, self._store, self._hasher, self._failures = database, store, hasher, failures
        self._cache_s = cache_s
        self._verified: OrderedDict[str, Verified] = OrderedDict()
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._running: dict[str, asyncio.Task[Key]] = {}
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="argon2")
        self._decoy = hasher.hash("nobody's key")
        self._generation = 0
        self._used: dict[str, datetime] = {}
        self._noting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._store.subscribe({CHANGED: self.forget}, after_gap=self.forget_all)
        self._noting = asyncio.create_task(self._note_uses(), name="last use of keys")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._noting is not None
        await tasks.end([self._noting])
        for check in list(self._running.values()):
            check.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        with suppress(StoreUnavailable):
            await self._write_uses()

    async def key_for(self, presented: str, address: str) -> Key:
        """Raises WrongKey, TooManyFailures (before any work), Overloaded or StoreUnavailable."""
        now = time.monotonic()
        parsed = api_key.parse(presented)
        known = self._verified.get(parsed.digest) if parsed else None
        if known is not None and now - known.checked_at < self._cache_s:
            return self._accept(known.key)
        if known is None:
            await self._failures.check(address)
            if parsed is None or self._refused.get(parsed.digest, 0.0) > now:
                raise await self._failures.count(address)
        assert parsed is not None
        try:
            return self._accept(await self._checked_once(parsed))
        except WrongKey as wrong:
            raise await self._failures.count(address) from wrong

    def _accept(self, key: Key) -> Key:
        if key.has_expired(time.time()):
            raise WrongKey
        self._used[key.id] = datetime.now(UTC)
        return key

    async def _checked_once(self, presented: PresentedKey) -> Key:
        """Callers with the same key share one check, which none of them can cancel."""
        task = self._running.get(presented.digest)
        if task is None:
            if len(self._running) >= WAITING_VERIFICATIONS:
                raise Overloaded(retry_after=1)
            task = asyncio.create_task(self._one_at_a_time(presented.secret_id, self._check(presented)))
            self._running[presented.digest] = task
            task.add_done_callback(lambda done: self._finished(presented.digest, done))
        return await asyncio.shield(task)

    def _finished(self, digest: str, task: asyncio.Task[Key]) -> None:
        self._running.pop(digest, None)
        if not task.cancelled():
            task.exception()

    async def _one_at_a_time(self, secret_id: str, check: Coroutine[Any, Any, Key]) -> Key:
        lock, users = self._locks.get(secret_id, (asyncio.Lock(), 0))
        self._locks[secret_id] = (lock, users + 1)
        try:
            async with lock:
                return await check
        finally:
            check.close()
            lock, users = self._locks.pop(secret_id)
            if users > 1:
                self._locks[secret_id] = (lock, users - 1)

    async def _check(self, presented: PresentedKey) -> Key:
        generation = self._generation
        known = self._verified.get(presented.digest)
        verified = None if known else await self._from_store(presented)
        if verified is None:
            try:
                verified = await self._from_database(presented, known)
            except StoreUnavailable:
                if known is None or time.monotonic() - known.checked_at > KNOWN_KEY_WITHOUT_DATABASE_S:
                    raise
                return known.key
            except WrongKey:
                self._refuse(presented)
                raise
            if generation == self._generation:
                await self._tell_store(presented, verified)
        if generation == self._generation:
            _remember(self._verified, presented.digest, verified)
        return verified.key

    def _refuse(self, presented: PresentedKey) -> None:
        self._verified.pop(presented.digest, None)
        _remember(self._refused, presented.digest, time.monotonic() + self._cache_s)

    async def _from_store(self, presented: PresentedKey) -> Verified | None:
        try:
            cached, refused = await self._store.pipeline(
                lambda pipe: pipe.get(cache_key(presented.secret_id)).get(_refused_key(presented.digest))
            )
        except StoreAway:
            return None
        if refused is not None:
            self._refuse(presented)
            raise WrongKey
        packed = strict_json.read_loosely(cached) if cached else None
        if packed is None or not hmac.compare_digest(packed["digest"], presented.digest):
            return None
        return Verified(unpack(packed), packed["hash"], time.monotonic())

    async def _tell_store(self, presented: PresentedKey, verified: Verified) -> None:
        packed = {**verified.key.packed(), "hash": verified.hash, "digest": presented.digest}
        with suppress(StoreAway):
            await self._store.call(
                lambda redis: redis.set(cache_key(presented.secret_id), strict_json.write(packed), px=self._cache_ms)
            )

    @property
    def _cache_ms(self) -> int:
        return int(self._cache_s * 1000)

    async def _from_database(self, presented: PresentedKey, known: Verified | None) -> Verified:
        row = await self._database.row("find_secret", presented.secret_id)
        stored = row["hash"] if row else self._decoy
        is_right = (known is not None and known.hash == stored) or await self._verify(stored, presented.whole)
        if row is None or not is_right or row["revoked_at"] is not None:
            with suppress(StoreAway):
                await self._store.call(lambda redis: redis.set(_refused_key(presented.digest), b"", px=self._cache_ms))
            raise WrongKey
        return Verified(unpack(dict(row)), stored, time.monotonic())

    async def _verify(self, stored: str, whole: str) -> bool:
        loop = asyncio.get_running_loop()
        with suppress(VerificationError, InvalidHashError):
            return await loop.run_in_executor(self._threads, self._hasher.verify, stored, whole)
        return False

    def forget(self, key_id: str) -> None:
        """A key has changed: ask again, for all of its secrets."""
        self._generation += 1
        for digest, verified in list(self._verified.items()):
            if verified.key.id == key_id:
                del self._verified[digest]

    def forget_all(self) -> None:
        """Changes may have been missed: ask again for every key, though argon2 need not run again."""
        self._generation += 1
        stale = time.monotonic() - self._cache_s
        for digest, verified in self._verified.items():
            self._verified[digest] = replace(verified, checked_at=min(verified.checked_at, stale))

    async def _note_uses(self) -> None:
        while True:
            await asyncio.sleep(NOTE_USE_EVERY_S)
            with suppress(StoreUnavailable):
                await self._write_uses()

    async def _write_uses(self) -> None:
        used, self._used = self._used, {}
        if used:
            await self._database.run("note_use", list(used), list(used.values()))


def _remember(memory: OrderedDict[str, Any], digest: str, value: object) -> None:
    memory[digest] = value
    memory.move_to_end(digest)
    if len(memory) > REMEMBERED:
        memory.popitem(last=False)


def _refused_key(digest: str) -> str:
    return f"nz:nokey:{digest}"
