"""Heartbeats: frames without content for a client that waits, so that neither it nor a proxy takes the call for dead."""

import asyncio
import time
from contextlib import suppress

from gateway.audit.record import Record
from gateway.core.background import TaskGroup
from gateway.core.cancel_scope import CallScope
from gateway.dialects.dialect import Call
from gateway.fleet.failover import FailoverRun
from gateway.fleet.opening import Opening
from gateway.proxy.relay import StreamedAnswer

PLACED_S = 0.2


def suit(call: Call) -> bool:
    """Whether the answer is sure to be a stream of frames: not if the backend decides, nor of a call that loads a model."""
    return call.stream and not call.operation.media and call.needs.prompt >= 0


class Heartbeats:
    """Sends one after each `every_s` seconds in which the client has got nothing, until an answer is opened."""

    def __init__(self, answer: StreamedAnswer, record: Record, every_s: float) -> None:
        self.answer, self._record, self._every_s = answer, record, every_s

    async def opening_of(self, run: FailoverRun, cancel_scope: CallScope) -> Opening:
        placed = asyncio.Event()
        run.on_queued = placed.set
        task = TaskGroup("heartbeats").start(self._keep_sending(run, placed))
        try:
            return await run.open(cancel_scope)
        finally:
            # Nothing is sent after this: a cancelled task does not continue after its wait, and the opening cannot get lost
            # in another wait here.
            task.cancel()

    async def _keep_sending(self, run: FailoverRun, placed: asyncio.Event) -> None:
        waited_s = time.monotonic() - self._record.began - self._record.reading_s
        await asyncio.sleep(max(0.0, self._every_s - waited_s))
        # The head has its place in the queue, which Redis soon gives, if at all.
        with suppress(TimeoutError):
            async with asyncio.timeout(PLACED_S):
                await placed.wait()
        if run.queued is not None:
            self._record.queue_position = run.queued.position
        while True:
            # It waits while the client does not read, so that frames do not pile up.
            await self.answer.send_heartbeat(run.early_frames())
            await asyncio.sleep(self._every_s)
