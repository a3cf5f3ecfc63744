"""The cost of requests in the stores, measured at their processes."""

import asyncio
import os
import time
import uuid
from pathlib import Path

import asyncpg
import redis

from gateway.audit.record import Record
from gateway.stores import redis_keys
from tests.bench.subjects import Subject
from tests.support.processes import until

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SIZE_OF_A_ROW = """
SELECT sum(pg_total_relation_size(relid))::float8 / (SELECT count(*) FROM audit)
FROM pg_partition_tree('audit') WHERE isleaf
"""


def redis_cpu_s(gateway: Subject) -> float:
    """Seconds of processor time that Redis has used."""
    with redis.Redis.from_url(gateway.names["REDIS_URL"]) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def postgres_cpu_s(folder: Path) -> float:
    """Seconds of processor time of the server in `folder` and of all its processes, those that have ended included."""
    server = int(next(folder.glob("stores/pg*/postmaster.pid")).read_text().split()[0])
    return sum(_cpu_s(pid) for pid in (server, *_children(server)))


def _children(parent: int) -> list[int]:
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    return [pid for pid in pids if (stat := _stat(pid)) and int(stat[1]) == parent]


def _cpu_s(pid: int) -> float:
    stat = _stat(pid)
    # proc(5): utime, stime, and those of children that were waited for.
    return sum(map(int, stat[11:15])) / TICKS_PER_S if stat else 0.0


def _stat(pid: int) -> list[str]:
    """The fields of proc(5) from the state on; empty if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def drained_rows_s(gateway: Subject, rows: int = 30_000) -> float:
    """How many audit rows one otherwise idle gateway moves from Redis to PostgreSQL in a second."""
    with redis.Redis.from_url(gateway.names["REDIS_URL"]) as client:
        # All at once, as after PostgreSQL was away.
        pipe = client.pipeline(transaction=True)
        for number in range(rows):
            pipe.xadd(redis_keys.BY_SHARD[number % redis_keys.SHARDS].rows, {"row": _row()})
        pipe.execute()
        began = time.monotonic()
        until(lambda: not any(client.xlen(shared.rows) for shared in redis_keys.BY_SHARD), 120)
    return rows / (time.monotonic() - began)


def _row() -> bytes:
    record = Record(uuid.uuid4().hex, uuid.uuid4().hex, "POST", "192.0.2.7", "bench/1")
    record.dialect, record.route, record.model = "openai", "/v1/chat/completions", "llama3.2:latest"
    record.backend, record.status, record.outcome = "backend-1", 200, "answered"
    return record.end(40, 120, "reported")


def bytes_of_a_row(gateway: Subject) -> float:
    """The size on disk, with indexes."""

    async def ask() -> float:
        connection = await asyncpg.connect(gateway.names["DATABASE_URL"])
        try:
            return float(await connection.fetchval(SIZE_OF_A_ROW))
        finally:
            await connection.close()

    return asyncio.run(ask())
