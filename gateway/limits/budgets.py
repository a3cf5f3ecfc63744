"""Budgets of tokens per day and month: when Redis has lost what was spent, it is read from the audit."""

from datetime import UTC, datetime

from gateway.dialects.model_names import canonical
from gateway.limits.quota import CounterSet, Quota, Rule
from gateway.stores import redis_keys
from gateway.stores.postgres import Database
from gateway.stores.redis_client import RedisClient

KEPT_S = 70 * 86_400


class Budgets:
    def __init__(self, database: Database, store: RedisClient) -> None:
        self._database, self._store = database, store

    async def seed(self, counter_set: CounterSet) -> None:
        """Raises RedisUnavailable or StoreUnavailable. Days and months are in UTC."""
        now = datetime.now(UTC)
        day = now.replace(hour=0, minute=0, second=0, microsecond=0)
        key_id, _, pattern = counter_set.name.partition("|")
        rows = await self._database.rows("tokens_spent", key_id, day, day.replace(day=1))
        rule = Rule(pattern, Quota())
        counted = [row for row in rows if not pattern or (row["model"] and rule.matches(canonical(row["model"]).canonical))]
        today, month = sum(row["day"] for row in counted), sum(row["month"] for row in counted)
        name = redis_keys.budget(counter_set.name)
        day_field, month_field = f"d{int(day.timestamp()) // 86_400}", f"m{now.year * 12 + now.month}"
        await self._store.pipeline(
            lambda pipe: pipe.hsetnx(name, day_field, today).hsetnx(name, month_field, month).expire(name, KEPT_S)
        )
