"""Who may call: keys with their rights, made, rotated, revoked and listed in PostgreSQL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from argon2 import PasswordHasher

from gateway import api_key
from gateway.database import Database
from gateway.errors import CommandFailed
from gateway.model_names import AllowList
from gateway.store import Store, StoreAway

CHANGED = "nz:keys:changed"
ADMIN_MODELS, SHOW_BACKEND = "admin_models", "show_backend"


@dataclass(frozen=True)
class Key:
    """An identity and its rights; None as a limit means the default, `expires_at` is in seconds since the epoch."""

    id: str
    name: str
    models: AllowList = field(default_factory=AllowList)
    rpm: int | None = None
    tpm: int | None = None
    concurrent: int | None = None
    flags: frozenset[str] = frozenset()
    expires_at: float | None = None

    def has_expired(self, now: float) -> bool:
        return self.expires_at is not None and now >= self.expires_at

    def packed(self) -> dict[str, object]:
        return {
            "id": self.id,
            "name": self.name,
            "models": self.models.patterns,
            "rpm": self.rpm,
            "tpm": self.tpm,
            "concurrent": self.concurrent,
            "flags": sorted(self.flags),
            "expires_at": self.expires_at,
        }


def unpack(packed: Mapping[str, Any]) -> Key:
    """A key from `Key.packed` or from a row of the database."""
    expires = packed["expires_at"]
    return Key(
        id=packed["id"],
        name=packed["name"],
        models=AllowList(tuple(packed["models"])),
        rpm=packed["rpm"],
        tpm=packed["tpm"],
        concurrent=packed["concurrent"],
        flags=frozenset(packed["flags"]),
        expires_at=expires.timestamp() if isinstance(expires, datetime) else expires,
    )


@dataclass(frozen=True)
class NewKey:
    """What an operator says of a key to be made."""

    name: str
    models: tuple[str, ...] = ()
    rpm: int | None = None
    tpm: int | None = None
    concurrent: int | None = None
    flags: tuple[str, ...] = ()
    lifetime: timedelta | None = None


class KeyRing:
    """The operator's side of keys; changes reach every process through Redis, at the latest after its cache time."""

    def __init__(self, database: Database, hasher: PasswordHasher, store: Store | None) -> None:
        self._database, self._hasher, self._store = database, hasher, store

    async def make(self, wanted: NewKey) -> tuple[str, str]:
        """Returns the key's id and the key itself, which is stored nowhere."""
        minted = api_key.mint()
        expires = datetime.now(UTC) + wanted.lifetime if wanted.lifetime else None
        rights = (list(wanted.models), wanted.rpm, wanted.tpm, wanted.concurrent, list(wanted.flags), expires)
        try:
            await self._database.run_all(
                [
                    ("add_key", (minted.secret_id, wanted.name, *rights)),
                    ("add_secret", (minted.secret_id, minted.secret_id, self._hasher.hash(minted.whole))),
                ]
            )
        except asyncpg.UniqueViolationError:
            raise CommandFailed(f"a key named {wanted.name!r} exists: choose another name, or rotate or revoke it") from None
        return minted.secret_id, minted.whole

    async def rotate(self, name_or_id: str, overlap: timedelta) -> tuple[str, str]:
        """A new secret for the same key; the old ones work for the overlap. Returns the key's id and the new key."""
        key_id = await self._living(name_or_id)
        minted = api_key.mint()
        await self._database.run_all(
            [
                ("lock_key", (key_id,)),
                ("add_secret", (minted.secret_id, key_id, self._hasher.hash(minted.whole))),
                ("expire_secrets", (key_id, minted.secret_id, datetime.now(UTC) + overlap)),
            ]
        )
        await self._announce(key_id)
        return key_id, minted.whole

    async def revoke(self, name_or_id: str) -> tuple[str, bool]:
        """Returns the key's id and whether every process was told at once (else they learn it with their cache time)."""
        key_id = await self._living(name_or_id)
        await self._database.run_all([("lock_key", (key_id,)), ("revoke_key", (key_id,))])
        return key_id, await self._announce(key_id)

    async def all(self) -> Sequence[Mapping[str, Any]]:
        return [dict(row) for row in await self._database.rows("list_keys")]

    async def count(self) -> int:
        return int(await self._database.value("count_living_keys"))

    async def _living(self, name_or_id: str) -> str:
        row = await self._database.row("find_living_key", name_or_id)
        if row is None:
            raise CommandFailed(f"there is no living key {name_or_id!r}: see `make keys`")
        return str(row["id"])

    async def _announce(self, key_id: str) -> bool:
        if self._store is None:
            return False
        secret_ids = [row["id"] for row in await self._database.rows("secret_ids", key_id)]
        try:
            await self._store.pipeline(
                lambda pipe: pipe.delete(*map(cache_key, secret_ids)).publish(CHANGED, key_id),
            )
        except StoreAway:
            return False
        return True


def cache_key(secret_id: str) -> str:
    return f"nz:key:{secret_id}"
