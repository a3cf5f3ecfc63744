"""The keys in PostgreSQL: made, limited, rotated, revoked and listed by operators."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from argon2 import PasswordHasher

from gateway.auth import key_format
from gateway.auth.key import DRILL, OPTIONS, Key, unpack
from gateway.core.errors import CommandFailed, NameTaken, NotFound
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
# A request counts in all rules of its key that match the model.
MOST_RULES = 100
BUDGETS, SECONDS = ("day", "month"), ("day_seconds", "month_seconds")


@dataclass(frozen=True)
class NewKey:
    """A key to be made."""

    name: str
    models: tuple[str, ...] = ()
    quota: Quota = field(default_factory=Quota)
    flags: tuple[str, ...] = ()
    lifetime: timedelta | None = None
    prompt_log: bool = False
    prompt_retention: timedelta | None = None
    audit_retention: timedelta | None = None
    weight: float = 1.0
    heartbeat_after_s: float | None = None


class KeyStore:
    """Changes reach every process at once through Redis, without it after the cache time of keys."""

    def __init__(self, database: Database, hasher: PasswordHasher, store: RedisClient | None) -> None:
        self._database, self._hasher, self._store = database, hasher, store

    async def make(self, wanted: NewKey) -> tuple[str, str]:
        """Returns the key's id and the key itself, of which only a hash is stored."""
        _check_new_key(wanted)
        if await self._database.row("find_key_by_id", wanted.name) is not None:
            raise NameTaken(f"{wanted.name!r} is the id of a key: choose a name that cannot be mistaken for it")
        minted = key_format.mint()
        expires = None if wanted.lifetime is None else datetime.now(UTC) + wanted.lifetime
        rights = (list(wanted.models), *wanted.quota.packed().values(), list(wanted.flags), expires)
        hashed = await self._hash(minted.whole)
        kept = (wanted.prompt_log, wanted.prompt_retention, wanted.audit_retention)
        options = (wanted.weight, wanted.heartbeat_after_s)
        try:
            await self._database.run_all(
                [
                    ("add_key", (minted.secret_id, wanted.name, *rights, *kept, *options)),
                    ("add_secret", (minted.secret_id, minted.secret_id, hashed)),
                ]
            )
        except DuplicateRow:
            raise NameTaken(f"a key named {wanted.name!r} exists: choose another name, or rotate or revoke it") from None
        return minted.secret_id, minted.whole

    async def _hash(self, whole: str) -> str:
        """In a thread, as it would block the event loop for a fifth of a second."""
        return await asyncio.to_thread(self._hasher.hash, whole)

    async def rotate(self, name_or_id: str, overlap: timedelta, *, by_id: bool = False) -> tuple[str, str]:
        """Adds a secret to a key; the old ones work for the overlap. Returns the key's id and the new key."""
        key_id = await self.active_id(name_or_id, by_id=by_id, usable=True)
        minted = key_format.mint()
        await self._database.run_all(
            [
                ("lock_key", (key_id,)),
                ("add_secret", (minted.secret_id, key_id, await self._hash(minted.whole))),
                ("expire_secrets", (key_id, minted.secret_id, datetime.now(UTC) + overlap)),
            ]
        )
        await self._announce(key_id)
        return key_id, minted.whole

    async def revoke(self, name_or_id: str, *, by_id: bool = False) -> tuple[str, bool]:
        """Returns the key's id and whether all processes were notified; if not, the cache time of keys has to pass."""
        key_id = await self.active_id(name_or_id, by_id=by_id)
        await self._database.run_all([("lock_key", (key_id,)), ("revoke_key", (key_id,))])
        return key_id, await self._announce(key_id)

    async def drop_drill_keys(self, ended_for: timedelta) -> None:
        """Deletes the keys of drills that ended this long ago."""
        await self._database.run("drop_drill_keys", DRILL, ended_for)

    async def limit(
        self, name_or_id: str, pattern: str, limits: Mapping[str, float | None], *, by_id: bool = False
    ) -> tuple[str, Mapping[str, float | None], bool]:
        """Sets limits and options of the key, or limits of its models that match `pattern`; None resets one to its default.

        Returns the key's id, all its limits and options or those of the models, and whether all processes were notified.
        """
        key_id = await self.active_id(name_or_id, by_id=by_id)
        _check_pattern(pattern, limits)
        pattern = model_names.rule_pattern(pattern)
        names = quota.NAMES if pattern else (*quota.NAMES, *OPTIONS)
        unchanged = [None, False] * len(names)
        before = None if pattern else await self._database.row("limit_key", key_id, *unchanged)
        changes = [limits.get(name) for name in names], [name in limits for name in names]
        values = [value for pair in zip(*changes, strict=True) for value in pair]
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
        counter_set = f"{key_id}|{pattern}" if pattern else key_id
        if not _has_budget(before, BUDGETS) and _has_budget(row, BUDGETS):
            await self._drop_count(redis_keys.budget(counter_set))
        if not _has_budget(before, SECONDS) and _has_budget(row, SECONDS):
            await self._drop_count(redis_keys.seconds(counter_set))
        return key_id, dict(row), await self._announce(key_id)

    async def _drop_count(self, name: bytes) -> None:
        """Without a budget nothing was counted: its use so far is computed again from the audit."""
        if self._store is not None:
            with suppress(RedisUnavailable):
                await self._store.call(lambda redis: redis.delete(name))

    async def all(self) -> Sequence[Mapping[str, Any]]:
        return [dict(row) for row in await self._database.rows("list_keys")]

    async def count(self) -> int:
        return int(await self._database.value("count_living_keys"))

    async def active_id(self, name_or_id: str, *, by_id: bool = False, usable: bool = False) -> str:
        """The id of a key that is not revoked, by its name, its id or the id of one of its secrets; an id is never treated as
        a name, and with `by_id` a name is not accepted. `usable`: it has not expired either. Raises NotFound."""
        query = "find_key_by_id" if by_id else "find_living_key"
        row = await self._database.row(query, name_or_id) if name_or_id.isprintable() else None
        if row is None or (by_id and row["revoked_at"] is not None):
            shown = f"{'with the id ' if by_id else ''}{key_format.redacted(name_or_id)!r}"
            raise NotFound(f"there is no active key {shown}: see `make keys`")
        if usable and row["expires_at"] is not None and row["expires_at"] <= datetime.now(UTC):
            raise CommandFailed(f"the key {name_or_id!r} has expired: revoke it and make another")
        return str(row["id"])

    async def active_key(self, name_or_id: str) -> Key:
        """A key that is not revoked, with its rights and limits. Raises NotFound."""
        row = await self._database.row("key_with_rights", await self.active_id(name_or_id))
        assert row is not None
        return unpack(dict(row))

    async def _announce(self, key_id: str) -> bool:
        if self._store is None:
            return False
        secret_ids = [row["id"] for row in await self._database.rows("secret_ids", key_id)]
        try:
            await self._store.pipeline(lambda pipe: _drop_cached(pipe, secret_ids))
            await self._store.call(lambda redis: redis.publish(redis_keys.KEYS_CHANGED, key_id))
        except RedisUnavailable:
            return False
        return True


def _drop_cached(pipe: Any, secret_ids: Sequence[str]) -> Any:
    for secret_id in secret_ids:
        pipe.incr(redis_keys.key_version(secret_id)).expire(redis_keys.key_version(secret_id), VERSION_KEPT_S)
        pipe.delete(redis_keys.verified_key(secret_id))
    return pipe


def _has_budget(row: Any, names: Sequence[str]) -> bool:
    return row is not None and any(row[name] not in (None, quota.UNLIMITED) for name in names)


def _check_new_key(wanted: NewKey) -> None:
    if not 0 < len(wanted.name) <= LONGEST_NAME or not wanted.name.isprintable():
        raise CommandFailed(f"a key's name must be 1 to {LONGEST_NAME} printable characters: choose another name")
    if key_format.redacted(wanted.name) != wanted.name:
        raise CommandFailed("a key's name must not be a key: choose a name that shows whose it is")
    if len(wanted.models) > MOST_PATTERNS:
        raise CommandFailed(f"a key's models may be at most {MOST_PATTERNS} names or globs: write globs, such as llama3*")
    for pattern in wanted.models:
        if not model_names.is_name(pattern):
            raise CommandFailed(f"{pattern[:64]!r} is no model's name: it {model_names.NAME_RULE}")


def _check_pattern(pattern: str, limits: Mapping[str, float | None]) -> None:
    of_whole_keys = ", ".join(name.upper() for name in OPTIONS if name in limits)
    if pattern and of_whole_keys:
        raise CommandFailed(f"{of_whole_keys} can only be set for a key as a whole, not for some of its models")
    if not pattern.isprintable() or len(pattern) > LONGEST_MODEL_NAME or len(pattern.split()) > 1:
        raise CommandFailed("MODEL must be one model's name or one glob, such as llama3*: write it without blanks")
