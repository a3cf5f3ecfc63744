"""Python processes that need not import the world anew: forked off one that has, else they are as any other.

A process of a second is one of a tenth; its interpreter's own start is what it does not show.
"""

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Self

from tests.support.project import PROJECT

GATEWAY = ("gateway.ops.main",)


class Preloaded:
    def __init__(self, *modules: str) -> None:
        self._asking, served = socket.socketpair()
        self._lock = threading.Lock()
        with served:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server_process", str(served.fileno()), *modules],
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                pass_fds=[served.fileno()],
            )
        atexit.register(self.end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        atexit.unregister(self.end)
        self._asking.close()
        self._process.wait(10)

    def run(
        self,
        module: str,
        words: Sequence[str],
        folder: Path,
        names: Mapping[str, str],
        *,
        said: str = "",
        timeout_s: float = 30.0,
    ) -> "subprocess.CompletedProcess[str]":
        """As subprocess.run does `python -m MODULE WORD…`; without a module what is `said` to it is its program."""
        with (
            tempfile.TemporaryFile("w+") as heard,
            tempfile.TemporaryFile("w+", newline="") as out,
            tempfile.TemporaryFile("w+", newline="") as wrong,
        ):
            heard.write(said)
            heard.seek(0)
            asked = {"module": module, "words": list(words), "folder": str(folder), "names": dict(names)}
            status = self._status(asked, [file.fileno() for file in (heard, out, wrong)], timeout_s)
            out.seek(0)
            wrong.seek(0)
            return subprocess.CompletedProcess(list(words), status, out.read(), wrong.read())

    def _status(self, asked: Mapping[str, object], standard: list[int], timeout_s: float) -> int:
        told, telling = socket.socketpair()
        with told:
            with telling, self._lock:
                line = json.dumps(asked).encode() + b"\n"
                sent = socket.send_fds(self._asking, [line], [*standard, telling.fileno()])
                self._asking.sendall(line[sent:])
            told.settimeout(timeout_s)
            with told.makefile("rb") as lines:
                process = int(lines.readline())
                try:
                    return int(lines.readline())
                except TimeoutError as late:
                    os.kill(process, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(str(asked["words"]), timeout_s) from late


@cache
def gateway() -> Preloaded:
    """For the command line."""
    return Preloaded(*GATEWAY)
