"""What requests cost the stores, as the stores' own processes say it."""

import os
from pathlib import Path

import redis

from tests.bench.subjects import Subject

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


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
    """proc(5), from the state on; empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
