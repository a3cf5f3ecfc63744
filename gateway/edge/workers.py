"""Several worker processes on one port: started, restarted when they die, and ended together."""

import asyncio
import ctypes
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from gateway.edge.stop_signals import stop_signals

LOG = logging.getLogger("gateway.workers")
PR_SET_PDEATHSIG = 1
TOO_SHORT_A_LIFE_S = 5.0
LONGEST_PAUSE_S = 10.0


def end_with_parent(parent: int) -> None:
    """On Linux: ends a worker whose supervisor was killed. Elsewhere this does nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


class Workers:
    """`count` worker processes, each with the listening socket.

    `on_end` is called with the process id of each worker that has ended.
    """

    def __init__(
        self,
        listener: socket.socket,
        count: int,
        stop_within_s: float,
        on_ready: Callable[[], None],
        on_end: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._listener, self._count, self._stop_within_s = listener, count, stop_within_s
        self._on_ready, self._on_end = on_ready, on_end
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in stop_signals():
            loop.add_signal_handler(number, self._stopping.set)
        async with asyncio.TaskGroup() as group:
            for _ in range(self._count):
                group.create_task(self._keep_one())
            self._on_ready()

    async def _keep_one(self) -> None:
        pause_s = 0.2
        while not self._stopping.is_set():
            began = time.monotonic()
            code = await self._run_one()
            if self._stopping.is_set():
                return
            LOG.error("a worker ended with code %s, starting another", code)
            pause_s = 0.2 if time.monotonic() - began > TOO_SHORT_A_LIFE_S else min(pause_s * 2, LONGEST_PAUSE_S)
            await self._sleep(pause_s)

    async def _run_one(self) -> int:
        descriptor = str(self._listener.fileno())
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "worker", descriptor, str(os.getpid())),
            pass_fds=[self._listener.fileno()],
            # Otherwise a terminal's Ctrl-C would also reach the workers, and a second signal ends them at once.
            start_new_session=True,
        )
        try:
            return await self._wait_for(process)
        finally:
            self._on_end(process.pid)

    async def _wait_for(self, process: asyncio.subprocess.Process) -> int:
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not ended.done():
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            done, _ = await asyncio.wait((ended,), timeout=self._stop_within_s)
            if not done:
                process.kill()
        return await ended

    async def _sleep(self, seconds: float) -> None:
        waiting = asyncio.create_task(self._stopping.wait())
        await asyncio.wait((waiting,), timeout=seconds)
        waiting.cancel()
