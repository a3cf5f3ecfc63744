"""Runs short Python processes by forking a process that has already imported their modules.

This takes a tenth of a second instead of a whole one; only the start of the interpreter itself is not covered.
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


class ForkServer:
    def __init__(self, *modules: str) -> None:
        self._requests, served = socket.socketpair()
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
        self._requests.close()
        self._process.wait(10)

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        stdin: str = "",
        timeout_s: float = 30.0,
    ) -> "subprocess.CompletedProcess[str]":
        """Like subprocess.run of `python -m MODULE ARGUMENT…`; without a module, `stdin` is the program."""
        with (
            tempfile.TemporaryFile("w+") as input_file,
            tempfile.TemporaryFile("w+", newline="") as output_file,
            tempfile.TemporaryFile("w+", newline="") as error_file,
        ):
            input_file.write(stdin)
            input_file.seek(0)
            request = {"module": module, "arguments": list(arguments), "folder": str(folder), "environment": dict(environment)}
            status = self._status(request, [file.fileno() for file in (input_file, output_file, error_file)], timeout_s)
            output_file.seek(0)
            error_file.seek(0)
            return subprocess.CompletedProcess(list(arguments), status, output_file.read(), error_file.read())

    def _status(self, request: Mapping[str, object], standard: list[int], timeout_s: float) -> int:
        reports, reporting = socket.socketpair()
        with reports:
            with reporting, self._lock:
                line = json.dumps(request).encode() + b"\n"
                sent = socket.send_fds(self._requests, [line], [*standard, reporting.fileno()])
                self._requests.sendall(line[sent:])
            reports.settimeout(timeout_s)
            with reports.makefile("rb") as lines:
                process = int(lines.readline())
                try:
                    return int(lines.readline())
                except TimeoutError as late:
                    os.kill(process, signal.SIGKILL)
                    raise subprocess.TimeoutExpired(str(request["arguments"]), timeout_s) from late


@cache
def gateway() -> ForkServer:
    """For the gateway's command line."""
    return ForkServer(*GATEWAY)
