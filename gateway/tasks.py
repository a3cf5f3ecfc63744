"""Ending background tasks: whoever started one ends it here."""

import asyncio
import logging
from collections.abc import Collection

LOG = logging.getLogger("gateway.tasks")
ATTEMPTS, ATTEMPT_S = 5, 1.0


async def end(tasks: Collection[asyncio.Task[None]]) -> None:
    """Cancel and wait; again where a library has swallowed the cancellation, as some do that arrives with a time-out."""
    pending = {task for task in tasks if not task.done()}
    for _ in range(ATTEMPTS):
        if not pending:
            return
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=ATTEMPT_S)
    for task in pending:
        LOG.error("the task %r could not be ended", task.get_name())
