"""A Python that has imported what many short processes need, and forks off each that is asked for (see preloaded.py)."""

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


def main(asking: socket.socket, modules: list[str]) -> None:
    """Until who asks is gone."""
    for module in modules:
        import_module(module)
    gc.freeze()
    while (received := receive(asking)) is not None:
        asked, fds = received
        if os.fork() == 0:
            asking.close()
            watch(asked, fds)
        for fd in fds:
            os.close(fd)
        bury(os.WNOHANG)
    bury(0)


def bury(how: int) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, how)[0]:
            pass


def receive(asking: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    data, fds, _, _ = socket.recv_fds(asking, 1 << 16, FDS)
    while data and not data.endswith(b"\n"):
        data += asking.recv(1 << 16)
    return (json.loads(data), fds) if data else None


def watch(asked: dict[str, Any], fds: list[int]) -> NoReturn:
    """Tells who asked of one process: its number when it begins, its status when it has ended."""
    *standard, told = fds
    process = os.fork()
    if process == 0:
        os.close(told)
        become(asked, standard)
    for fd in standard:
        os.close(fd)
    os.write(told, b"%d\n" % process)
    _, status = os.waitpid(process, 0)
    os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def become(asked: dict[str, Any], standard: list[int]) -> NoReturn:
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(asked["folder"])
    os.environ.clear()
    os.environ.update(asked["names"])
    sys.argv = ["-", *asked["words"]]
    try:
        run(asked["module"])
        status = 0
    except SystemExit as ended:
        status = status_of(ended)
    except BaseException:  # noqa: BLE001 as an interpreter tells of it
        traceback.print_exc()
        status = 1
    # What was imported need not be taken apart.
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
