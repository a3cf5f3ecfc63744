"""A Redis or a Sentinel for one test, on a TCP port."""

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import redis

from gateway.ops.local import stores
from tests.support.processes import free_port, until


@contextmanager
def server(folder: Path, *arguments: str, sentinel: bool = False) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    config = folder / f"{port}.conf"
    config.write_text("\n".join((f"port {port}", "bind 127.0.0.1", f"dir {folder}", 'save ""', *arguments)) + "\n")
    program = str(next(stores.redis_programs()))
    command = [program, str(config), *(["--sentinel"] if sentinel else [])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: answers(port), 10)
        yield process, port
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(10)


def answers(port: int) -> bool:
    try:
        with redis.Redis(port=port, socket_timeout=1) as client:
            return bool(client.ping())
    except redis.AuthenticationError:
        return True
    except redis.RedisError:
        return False
