"""What a process keeps of its memory: little of what a peak took, and no long look through what never changes."""

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
async def kept_small(trimming: KeptTask) -> AsyncIterator[None]:
    """From the end of the start to the end of the block; `tidying` as made by `keeper`."""
    spare_the_collector()
    return_large_blocks()
    trimming.start()
    try:
        yield
    finally:
        await trimming.end()


def spare_the_collector() -> None:
    """What is there now stays: looking through it again and again only makes requests wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)


def return_large_blocks() -> None:
    """Bodies of some 100 KB go back to the system when they are done with, instead of growing what is kept (mallopt(3))."""
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        for parameter in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            libc.mallopt(parameter, LARGE_BLOCK)


def trim() -> None:
    """What is free between the blocks in use goes back, too (malloc_trim(3)): one or two milliseconds."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


async def _keep_trimming() -> None:
    while True:
        trim()
        await asyncio.sleep(TRIM_EVERY_S)
