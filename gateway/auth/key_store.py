"""Who may call: keys with their rights, made, rotated, revoked and listed in PostgreSQL."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from argon2 import PasswordHasher

from gateway.auth import key_format
from gateway.auth.key import DRILL, Key, unpack
from gateway.core.errors import CommandFailed, NameTaken, NotThere
from gateway.dialects import model_names
from gateway.dialects.model_names import LONGEST_NAME as LONGEST_MODEL_NAME
from gateway.dialects.model_names import MOST_PATTERNS
from gateway.limits import quota
from gateway.limits.quota import Quota
from gateway.stores import redis_keys
from gateway.stores.postgres import Database, DuplicateRow
from gateway.stores.redis_client import RedisClient, RedisUnavailable

VERSION_KEPT_S = 86_400
LONGEST_NAME = 200
# Each request of a key counts in all that match.
MOST_RULES = 100


@dataclass(frozen=True)
class NewKey:
    """What an operator says of a key to be made."""

    name: str
    models: tuple[str, ...] = ()
    quota: Quota = field(default_factory=Quota)
    flags: tuple[str, ...] = ()
    lifetime: timedelta | None = None
    prompt_log: bool = False
    prompt_retention: timedelta | None = None
    audit_retention: timedelta | None = None


class KeyStore:
    """The operator's side of keys; changes reach every process through Redis, at the latest after its cache time."""

    def __init__(self, database: Database, hasher: PasswordHasher, store: RedisClient | None) -> None:
        self._database, self._hasher, self._store = database, hasher, store

    async def make(self, wanted: NewKey) -> tuple[str, str]:
        """Returns the key's id and the key itself, which is stored nowhere."""
        _refuse_unreadable(wanted)
        if await self._database.row("find_key_by_id", wanted.name) is not None:
            raise NameTaken(f"{wanted.name!r} is the id of a key: choose a name that cannot be mistaken for it")
        minted = key_format.mint()
        expires = None if wanted.lifetime is None else datetime.now(UTC) + wanted.lifetime
        rights = (list(wanted.models), *wanted.quota.packed().values(), list(wanted.flags), expires)
        hashed = await self._hashed(minted.whole)
        kept = (wanted.prompt_log, wanted.prompt_retention, wanted.audit_retention)
        try:
            await self._database.run_all(
                [
                    ("add_key", (minted.secret_id, wanted.name, *rights, *kept)),
                    ("add_secret", (minted.secret_id, minted.secret_id, hashed)),
                ]
            )
        except DuplicateRow:
            raise NameTaken(f"a key named {wanted.name!r} exists: choose another name, or rotate or revoke it") from None
        return minted.secret_id, minted.whole

    async def _hashed(self, whole: str) -> str:
        """In a thread: it takes a fifth of a second, in which a gateway has other things to do."""
        return await asyncio.to_thread(self._hasher.hash, whole)

    async def rotate(self, name_or_id: str, overlap: timedelta, *, by_id: bool = False) -> tuple[str, str]:
        """A new secret for the same key; the old ones work for the overlap. Returns the key's id and the new key."""
        key_id = await self.active_id(name_or_id, by_id=by_id, usable=True)
        minted = key_format.mint()
        await self._database.run_all(
            [
                ("lock_key", (key_id,)),
                ("add_secret", (minted.secret_id, key_id, await self._hashed(minted.whole))),
                ("expire_secrets", (key_id, minted.secret_id, datetime.now(UTC) + overlap)),
            ]
        )
        await self._announce(key_id)
        return key_id, minted.whole

    async def revoke(self, name_or_id: str, *, by_id: bool = False) -> tuple[str, bool]:
        """Returns the key's id and whether every process was told at once (else they learn it with their cache time)."""
        key_id = await self.active_id(name_or_id, by_id=by_id)
        await self._database.run_all([("lock_key", (key_id,)), ("revoke_key", (key_id,))])
        return key_id, await self._announce(key_id)

    async def drop_drills(self, ended_for: timedelta) -> None:
        """The keys of drills that ended so long ago, which nobody can use any more."""
        await self._database.run("drop_drill_keys", DRILL, ended_for)

    async def limit(
        self, name_or_id: str, pattern: str, limits: Mapping[str, int | None], *, by_id: bool = False
    ) -> tuple[str, Quota, bool]:
        """Set these limits, of the key or of its models that match `pattern`; None resets one to its default.

        Returns the key's id, the whole quota as it is now, and whether every process was told at once.
        """
        key_id = await self.active_id(name_or_id, by_id=by_id)
        _refuse_unreadable_pattern(pattern)
        pattern = model_names.rule_pattern(pattern)
        names = list(quota.NAMES)
        nothing_said = [None, False] * len(names)
        before = None if pattern else await self._database.row("limit_key", key_id, *nothing_said)
        wishes = [limits.get(name) for name in names], [name in limits for name in names]
        values = [value for pair in zip(*wishes, strict=True) for value in pair]
        if pattern:
            row = await self._database.row("limit_models", key_id, pattern, *values, MOST_RULES)
            if row is None:
                raise CommandFailed(
                    f"a key may have limits for at most {MOST_RULES} models or globs: write globs, or unset one"
                )
            if not any(row[name] is not None for name in names):
                await self._database.run("drop_model_limits", key_id, pattern)
        else:
            row = await self._database.row("limit_key", key_id, *values)
        assert row is not None
        if not _has_budget(before) and _has_budget(row):
            await self._forget_spent(f"{key_id}|{pattern}" if pattern else key_id)
        return key_id, quota.unpack(dict(row)), await self._announce(key_id)

    async def _forget_spent(self, scope: str) -> None:
        """Nobody counted while there was no budget: what the audit knows is asked for anew."""
        if self._store is not None:
            with suppress(RedisUnavailable):
                await self._store.call(lambda redis: redis.delete(redis_keys.budget(scope)))

    async def all(self) -> Sequence[Mapping[str, Any]]:
        return [dict(row) for row in await self._database.rows("list_keys")]

    async def count(self) -> int:
        return int(await self._database.value("count_living_keys"))

    async def active_id(self, name_or_id: str, *, by_id: bool = False, usable: bool = False) -> str:
        """The id of a key that is not revoked, by its name, its id or the id of one of its secrets; an id is never taken for a
        name, and `by_id` takes no name. `usable`: it has not expired either. Raises NotThere."""
        query = "find_key_by_id" if by_id else "find_living_key"
        row = await self._database.row(query, name_or_id) if name_or_id.isprintable() else None
        if row is None or (by_id and row["revoked_at"] is not None):
            shown = f"{'with the id ' if by_id else ''}{key_format.redacted(name_or_id)!r}"
            raise NotThere(f"there is no active key {shown}: see `make keys`")
        if usable and row["expires_at"] is not None and row["expires_at"] <= datetime.now(UTC):
            raise CommandFailed(f"the key {name_or_id!r} has expired: revoke it and make another")
        return str(row["id"])

    async def active_key(self, name_or_id: str) -> Key:
        """A key that is not revoked, as its callers have it. Raises NotThere."""
        row = await self._database.row("key_with_rights", await self.active_id(name_or_id))
        assert row is not None
        return unpack(dict(row))

    async def _announce(self, key_id: str) -> bool:
        if self._store is None:
            return False
        secret_ids = [row["id"] for row in await self._database.rows("secret_ids", key_id)]
        try:
            await self._store.pipeline(lambda pipe: _forget(pipe, secret_ids))
            await self._store.call(lambda redis: redis.publish(redis_keys.KEYS_CHANGED, key_id))
        except RedisUnavailable:
            return False
        return True


def _forget(pipe: Any, secret_ids: Sequence[str]) -> Any:
    for secret_id in secret_ids:
        pipe.incr(redis_keys.key_version(secret_id)).expire(redis_keys.key_version(secret_id), VERSION_KEPT_S)
        pipe.delete(redis_keys.verified_key(secret_id))
    return pipe


def _has_budget(row: Any) -> bool:
    return row is not None and any(row[name] not in (None, quota.UNLIMITED) for name in ("day", "month"))


def _refuse_unreadable(wanted: NewKey) -> None:
    if not 0 < len(wanted.name) <= LONGEST_NAME or not wanted.name.isprintable():
        raise CommandFailed(f"a key's name must be 1 to {LONGEST_NAME} printable characters: choose another name")
    if key_format.redacted(wanted.name) != wanted.name:
        raise CommandFailed("a key's name must not be a key: choose a name that says whose it is")
    if len(wanted.models) > MOST_PATTERNS:
        raise CommandFailed(f"a key's models may be at most {MOST_PATTERNS} names or globs: write globs, such as llama3*")
    for pattern in wanted.models:
        if not model_names.is_name(pattern):
            raise CommandFailed(f"{pattern[:64]!r} is no model's name: it {model_names.NAME_RULE}")


def _refuse_unreadable_pattern(pattern: str) -> None:
    if not pattern.isprintable() or len(pattern) > LONGEST_MODEL_NAME or len(pattern.split()) > 1:
        raise CommandFailed("MODEL must be one model's name or one glob, such as llama3*: write it without blanks")
