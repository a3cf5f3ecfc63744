"""Starts the programs of a run, and measures the processor time of processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.processes import environment
from tests.support.project import PROJECT

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
STOPS_S = 10.0


class CannotRun(Exception):
    """The message says what failed."""


@contextmanager
def serving(module: str, *words: str) -> Iterator[tuple[Any, int]]:
    """A program of this folder: what it printed as JSON when it was ready, and its process id."""
    process = subprocess.Popen(
        command(module, *words), cwd=PROJECT, env=environment({}), stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line:
            raise CannotRun(f"{module} did not start")
        yield json.loads(line), process.pid
    finally:
        process.kill()
        process.wait(STOPS_S)
        if process.stdout:
            process.stdout.close()


def output(module: str, *words: str) -> Any:
    """What a program printed as JSON until it ended."""
    done = subprocess.run(
        command(module, *words), cwd=PROJECT, env=environment({}), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise CannotRun(f"{module}: {done.stderr[-1000:]}")
    return json.loads(done.stdout)


def command(module: str, *words: str) -> Sequence[str]:
    return [sys.executable, "-m", f"tests.bench.fleet.{module}", *words]


def cpu_s(pids: Iterable[int]) -> float:
    return sum(_cpu_s(pid) for pid in pids)


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # proc(5): utime and stime.
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S
