"""Budgets per day and month, of tokens and of seconds: when Redis has lost what was spent, it is read from the audit."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

from gateway.dialects.model_names import canonical
from gateway.limits.quota import CounterSet, Quota, Rule
from gateway.stores import redis_keys
from gateway.stores.postgres import Database, Row
from gateway.stores.redis_client import RedisClient

KEPT_S = 70 * 86_400
# No index has the seconds: for a key with very many calls they are read for longer than a call waits.
SECONDS_WITHIN_S = 30.0


class Budgets:
    def __init__(self, database: Database, store: RedisClient) -> None:
        self._database, self._store = database, store
        self._one_at_a_time = asyncio.Lock()

    async def seed(self, counter_set: CounterSet) -> None:
        """Raises RedisUnavailable or StoreUnavailable. Days and months are in UTC."""
        now = datetime.now(UTC)
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        key_id = counter_set.name.partition("|")[0]
        if counter_set.has_budget:
            rows: Sequence[Row] = await self._database.rows("tokens_spent", key_id, day, day.replace(day=1))
            await self._keep(redis_keys.budget(counter_set.name), counter_set, day, rows)
        if counter_set.limits_seconds:
            async with self._one_at_a_time, self._database.connection() as connection:
                query = self._database.sql("seconds_spent")
                rows = await connection.fetch(query, key_id, day, day.replace(day=1), timeout=SECONDS_WITHIN_S)
            await self._keep(redis_keys.seconds(counter_set.name), counter_set, day, rows)

    async def _keep(self, name: bytes, counter_set: CounterSet, day: datetime, rows: Sequence[Row]) -> None:
        """Of a rule only what its models have spent."""
        pattern = counter_set.name.partition("|")[2]
        rule = Rule(pattern, Quota())
        counted = [row for row in rows if not pattern or (row["model"] and rule.matches(canonical(row["model"]).canonical))]
        today, month = sum(row["day"] for row in counted), sum(row["month"] for row in counted)
        day_field, month_field = f"d{int(day.timestamp()) // 86_400}", f"m{day.year * 12 + day.month}"
        await self._store.pipeline(
            lambda pipe: pipe.hsetnx(name, day_field, today).hsetnx(name, month_field, month).expire(name, KEPT_S)
        )
