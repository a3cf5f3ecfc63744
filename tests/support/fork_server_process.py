"""The process of a fork server: imports modules once, then forks a child for each request (see fork_server.py)."""

import atexit
import gc
import json
import os
import runpy
import socket
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from typing import Any, NoReturn

FDS = 4


def main(requests: socket.socket, modules: list[str]) -> None:
    """Serves until the other side closes the connection."""
    for module in modules:
        import_module(module)
    gc.freeze()
    while (received := receive(requests)) is not None:
        request, fds = received
        if os.fork() == 0:
            requests.close()
            watch(request, fds)
        for fd in fds:
            os.close(fd)
        reap(os.WNOHANG)
    reap(0)


def reap(how: int) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, how)[0]:
            pass


def receive(requests: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    data, fds, _, _ = socket.recv_fds(requests, 1 << 16, FDS)
    while data and not data.endswith(b"\n"):
        data += requests.recv(1 << 16)
    return (json.loads(data), fds) if data else None


def watch(request: dict[str, Any], fds: list[int]) -> NoReturn:
    """Runs one child; reports its process id when it starts and its exit status when it has ended."""
    *standard, reports = fds
    process = os.fork()
    if process == 0:
        os.close(reports)
        become(request, standard)
    for fd in standard:
        os.close(fd)
    os.write(reports, b"%d\n" % process)
    _, status = os.waitpid(process, 0)
    os.write(reports, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(request: dict[str, Any], standard: list[int]) -> NoReturn:
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["-", *request["arguments"]]
    try:
        run(request["module"])
        status = 0
    except SystemExit as ended:
        status = status_of(ended)
    except BaseException:  # noqa: BLE001 as the interpreter prints it
        traceback.print_exc()
        status = 1
    # Skips the interpreter's finalisation, which takes time and changes nothing here.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(module: str) -> None:
    if module:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), {"__name__": "__main__"})


def status_of(ended: SystemExit) -> int:
    if isinstance(ended.code, int | None):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
