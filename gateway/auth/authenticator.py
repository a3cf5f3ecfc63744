"""Finds the key of a request: cached by digest, and verified by argon2 only if it is not in the cache."""

import asyncio
import hmac
import math
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Self

from gateway.auth import key_format
from gateway.auth.auth_failures import AuthFailures, address_group
from gateway.auth.key import Key, unpack
from gateway.auth.key_format import PresentedKey
from gateway.auth.verifier import Verifier
from gateway.core import strict_json
from gateway.core.background import KeptTask
from gateway.core.errors import Overloaded, StoreUnavailable, WrongKey
from gateway.stores import redis_keys
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient, RedisUnavailable

CACHE_SIZE = 10_000
# Keys that are not in the cache and are being checked; above the sum of the verifier's limits.
MOST_UNCACHED = 640
VALID_WITHOUT_DATABASE_S = 900.0
WRITE_USES_EVERY_S = 20.0
RETRY_DATABASE_S = 5.0
SET_IF_UNCHANGED = """
if (redis.call('GET', KEYS[2]) or '') == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
end
"""


@dataclass(frozen=True)
class Verified:
    """A verified key and its hash; when the database was last checked, and until when that is enough."""

    key: Key
    hash: str
    checked_at: float
    fresh_until: float


class Authenticator:
    """`async with Authenticator(...)`: finds the key of a caller.

    A verified digest is cached for `cache_s`; then its row is read again, without argon2 if the hash is unchanged. While
    PostgreSQL is unavailable it stays valid for a quarter of an hour after its last check, and other keys get 503.
    """

    def __init__(
        self, database: Database, store: RedisClient, verifier: Verifier, failures: AuthFailures, *, cache_s: float
    ) -> None:
        self._database, self._store, self._verifier, self._failures = database, store, verifier, failures
        self._cache_s = cache_s
        self._verified: OrderedDict[str, Verified] = OrderedDict()
        self._refused: OrderedDict[str, float] = OrderedDict()
        self._checks: dict[str, asyncio.Task[Key]] = {}
        self._generation = 0
        self._uncached = 0
        self._attempts: set[tuple[str, str]] = set()
        self._used: dict[str, float] = {}
        self.background = KeptTask(self._keep_writing_uses, "last use of keys")

    async def __aenter__(self) -> Self:
        self._store.subscribe({redis_keys.KEYS_CHANGED: self.forget}, after_gap=self.forget_all)
        self.background.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.background.end()
        for task in list(self._checks.values()):
            task.cancel()
        await asyncio.gather(*self._checks.values(), return_exceptions=True)
        self._verifier.close()
        with suppress(StoreUnavailable):
            await self._write_uses()

    async def key_for(self, presented: str, address: str) -> Key:
        """Raises WrongKey, TooManyFailures (before any work), Overloaded or StoreUnavailable."""
        now = time.monotonic()
        known = self._verified.get(key_format.digest(presented))
        if known is not None and now < known.fresh_until:
            return self._accept(known.key)
        parsed = key_format.parse(presented)
        if known is None:
            self._failures.check(address)
            if parsed is None or self._refused.get(parsed.digest, 0.0) > now:
                raise await self._failures.record_failure(address)
        assert parsed is not None
        return self._accept(await self._check_once(parsed, known, address))

    def _accept(self, key: Key) -> Key:
        now = time.time()
        if key.has_expired(now):
            raise WrongKey
        self._used[key.id] = now
        return key

    async def _check_once(self, presented: PresentedKey, known: Verified | None, address: str) -> Key:
        """Callers with the same key share one check, which none of them can cancel.

        A key that was verified before needs no argon2, so keys that are new never delay it.
        """
        task = self._checks.get(presented.digest)
        if task is None:
            if known is not None:
                check = self._check(presented)
            elif self._uncached >= MOST_UNCACHED:
                raise Overloaded(retry_after=1)
            else:
                check = self._check_uncached(presented, address)
            task = asyncio.create_task(check)
            self._checks[presented.digest] = task
            task.add_done_callback(lambda done: self._finished(presented.digest, done))
        return await asyncio.shield(task)

    async def _check_uncached(self, presented: PresentedKey, address: str) -> Key:
        # Many may have passed the first check at once: now those before this one are counted.
        self._failures.check(address)
        # One at a time per id and address, whether the id exists or not: no address can fill the queue of a key of others.
        attempt = presented.secret_id, address_group(address)
        if attempt in self._attempts:
            await self._failures.record_failure(address)
            raise Overloaded(retry_after=1)
        self._attempts.add(attempt)
        self._uncached += 1
        try:
            with self._failures.verifying(address):
                try:
                    return await self._check(presented)
                except WrongKey as error:
                    raise await self._failures.record_failure(address) from error
        finally:
            self._uncached -= 1
            self._attempts.remove(attempt)

    def _finished(self, digest: str, task: asyncio.Task[Key]) -> None:
        self._checks.pop(digest, None)
        if not task.cancelled():
            task.exception()

    async def _check(self, presented: PresentedKey) -> Key:
        generation = self._generation
        known = self._verified.get(presented.digest)
        cached, version = (None, None) if known else await self._from_redis(presented)
        try:
            verified = cached or await self._from_database(presented, known)
        except StoreUnavailable:
            verified = self._still_valid(known)
        except WrongKey:
            self._refuse(presented)
            raise
        if generation == self._generation:
            _cache(self._verified, presented.digest, verified)
            if cached is None and version is not None:
                await self._store_in_redis(presented, verified, version)
        return verified.key

    def _still_valid(self, known: Verified | None) -> Verified:
        now = time.monotonic()
        if known is None or now - known.checked_at > VALID_WITHOUT_DATABASE_S:
            raise StoreUnavailable
        return replace(known, fresh_until=now + RETRY_DATABASE_S)

    def _refuse(self, presented: PresentedKey) -> None:
        self._verified.pop(presented.digest, None)
        _cache(self._refused, presented.digest, time.monotonic() + self._cache_s)

    async def _from_redis(self, presented: PresentedKey) -> tuple[Verified | None, bytes | None]:
        """The result of another process, and the version of the key, which is read before the database is."""
        try:
            packed, refused, version = await self._store.pipeline(
                lambda pipe: (
                    pipe.get(redis_keys.verified_key(presented.secret_id))
                    .get(redis_keys.refused_key(presented.digest))
                    .get(redis_keys.key_version(presented.secret_id))
                )
            )
        except RedisUnavailable:
            return None, None
        if refused is not None:
            self._refuse(presented)
            raise WrongKey
        return self._unpacked(packed, presented), version or b""

    def _unpacked(self, text: bytes | None, presented: PresentedKey) -> Verified | None:
        """None if there is no text or it is not valid: Redis may hold anything."""
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            packed = strict_json.read_loosely(text or b"")
            age = max(0.0, time.time() - packed["checked_at"])
            if age < self._cache_s and hmac.compare_digest(packed["digest"], presented.digest):
                now = time.monotonic()
                return Verified(unpack(packed), packed["hash"], now - age, now - age + self._cache_s)
        return None

    async def _store_in_redis(self, presented: PresentedKey, verified: Verified, version: bytes) -> None:
        """Unless the key has changed since it was read: a revocation must not be overwritten."""
        age = time.monotonic() - verified.checked_at
        packed = {**verified.key.packed(), "hash": verified.hash, "digest": presented.digest, "checked_at": time.time() - age}
        names = (redis_keys.verified_key(presented.secret_id), redis_keys.key_version(presented.secret_id))
        values = (version, strict_json.write(packed), int(self._cache_s * 1000))
        with suppress(RedisUnavailable):
            await self._store.call(lambda redis: redis.eval(SET_IF_UNCHANGED, 2, *names, *values))

    async def _from_database(self, presented: PresentedKey, known: Verified | None) -> Verified:
        row = await self._database.row("find_secret", presented.secret_id)
        stored = row["hash"] if row else None
        # A cached key whose row is gone needs no argon2.
        was_right = known is not None and stored in (None, known.hash)
        is_right = was_right or await self._verifier.is_right(stored, presented)
        if row is None or stored is None or not is_right or row["revoked_at"] is not None:
            with suppress(RedisUnavailable):
                await self._store.call(
                    lambda redis: redis.set(redis_keys.refused_key(presented.digest), b"", px=int(self._cache_s * 1000))
                )
            raise WrongKey
        now = time.monotonic()
        return Verified(unpack(dict(row)), stored, now, now + self._cache_s)

    def forget(self, key_id: str) -> None:
        """A key has changed: read the rows of all its secrets again, without argon2.

        It may have been revoked, so without the database it is no longer valid (unlike in `forget_all`).
        """
        self._generation += 1
        for digest, verified in list(self._verified.items()):
            if verified.key.id == key_id:
                self._verified[digest] = replace(verified, fresh_until=0.0, checked_at=-math.inf)

    def forget_all(self) -> None:
        """Changes may have been missed: read the rows of all keys again, without argon2."""
        self._generation += 1
        for digest, verified in self._verified.items():
            self._verified[digest] = replace(verified, fresh_until=0.0)

    async def _keep_writing_uses(self) -> None:
        while True:
            await asyncio.sleep(WRITE_USES_EVERY_S)
            with suppress(StoreUnavailable):
                await self._write_uses()

    async def _write_uses(self) -> None:
        used, self._used = self._used, {}
        if not used:
            return
        try:
            await self._database.run("note_use", list(used), [datetime.fromtimestamp(at, UTC) for at in used.values()])
        except BaseException:
            self._used = used | self._used
            raise


def _cache(cache: OrderedDict[str, Any], digest: str, value: object) -> None:
    cache[digest] = value
    cache.move_to_end(digest)
    if len(cache) > CACHE_SIZE:
        cache.popitem(last=False)
