"""Memory of the process: what a peak took is returned to the system, and permanent objects are not collected again."""

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import AsyncIterator

from gateway.core.background import KeptTask

# Numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK = 128 * 1024
TRIM_EVERY_S = 60.0


def trimming_task() -> KeptTask:
    return KeptTask(_keep_trimming, "memory")


@contextlib.asynccontextmanager
async def bounded_memory(trimming: KeptTask) -> AsyncIterator[None]:
    """For the time of serving; `trimming` is the task of `trimming_task`."""
    freeze_permanent_objects()
    return_large_blocks()
    trimming.start()
    try:
        yield
    finally:
        await trimming.end()


def freeze_permanent_objects() -> None:
    """Objects that exist now are permanent: to collect them again and again would only delay requests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def return_large_blocks() -> None:
    """Memory of large bodies is returned to the system at once, instead of enlarging the heap (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, LARGE_BLOCK)


def trim() -> None:
    """Returns free memory between used blocks, too (malloc_trim(3)); takes one or two milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def _keep_trimming() -> None:
    while True:
        trim()
        await asyncio.sleep(TRIM_EVERY_S)
