"""Gateways in their own processes, as operators start them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.support import fork_server
from tests.support.project import PROJECT

KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "PYTHONPYCACHEPREFIX")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(names: dict[str, str]) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    return {**kept, "PYTHONPATH": str(PROJECT), **names}


@contextmanager
def serving(
    folder: Path,
    names: dict[str, str],
    verb: str = "serve",
    *,
    new_group: bool = False,
    entry: Sequence[str] = ("-m", "gateway"),
) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The process, its URL, and the file with its output."""
    port = free_port()
    log = folder / f"{verb}-{port}.log"
    named = {**names, "GATEWAY_BIND_HOST": "127.0.0.1", "GATEWAY_BIND_PORT": str(port)}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *entry, verb],
            cwd=folder,
            env=environment(named),
            stdout=out,
            stderr=out,
            start_new_session=new_group,
        )
        try:
            until(lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}/healthz"), 30)
            assert process.poll() is None, log.read_text()
            yield process, f"http://127.0.0.1:{port}", log
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)


def operate(folder: Path, names: dict[str, str], *words: str) -> str:
    """The output of a command."""
    done = fork_server.gateway().run("gateway", words, folder, environment(names))
    assert done.returncode == 0, done.stderr
    return done.stdout


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def until(done: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def descendants(pid: int) -> set[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    parents = dict(zip(map(int, listed[::2]), map(int, listed[1::2]), strict=True))
    found: set[int] = set()
    grown = {pid}
    while grown:
        found |= grown
        grown = {child for child, parent in parents.items() if parent in found} - found
    return found - {pid}


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
