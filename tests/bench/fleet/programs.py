"""Starts the programs of a run, and measures the processor time of processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

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


class Waiting:
    """A program that has started and begins when it gets a line."""

    def __init__(self, module: str, *words: str) -> None:
        self._module = module
        self._process = subprocess.Popen(
            command(module, *words),
            cwd=PROJECT,
            env=environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def begin(self, line: object) -> Any:
        """What the program printed as JSON until it ended."""
        printed, failure = self._process.communicate(json.dumps(line) + "\n")
        if self._process.returncode:
            raise CannotRun(f"{self._module}: {failure[-1000:]}")
        return json.loads(printed)


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
