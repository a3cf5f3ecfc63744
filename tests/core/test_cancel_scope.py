"""Scopes end work with their own reason, nested or cancelled from outside."""

import asyncio
from collections.abc import Callable

import pytest

from gateway.core.cancel_scope import CancelScope


class Reason(Exception):
    pass


class Other(Exception):
    pass


async def _deadlines() -> None:
    with pytest.raises(Reason), CancelScope() as cancel_scope:
        cancel_scope.within(0.01, Reason)
        await asyncio.sleep(5)
    with CancelScope() as cancel_scope:
        cancel_scope.within(0.01, Reason)
        cancel_scope.within(5, Reason)
        await asyncio.sleep(0.05)
        cancel_scope.without_deadline()
    with pytest.raises(Reason), CancelScope() as cancel_scope:
        cancel_scope.within(5, Other)
        cancel_scope.within(0.01, Reason)
        await asyncio.sleep(5)


async def _nesting() -> None:
    with pytest.raises(Other), CancelScope() as outer:
        outer.within(0.01, Other)
        with CancelScope() as inner:
            inner.within(5, Reason)
            await asyncio.sleep(5)
    with CancelScope() as outer:
        outer.within(5, Other)
        with pytest.raises(Reason), CancelScope() as inner:
            inner.within(0.01, Reason)
            await asyncio.sleep(5)
        await asyncio.sleep(0)


async def _cancelled_from_outside() -> None:
    async def work() -> None:
        with CancelScope() as cancel_scope:
            cancel_scope.within(5, Reason)
            await asyncio.sleep(5)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("story", [_deadlines, _nesting, _cancelled_from_outside])
def test_scopes_nest_and_end_with_their_own_reason(story: Callable[[], object]) -> None:
    asyncio.run(story())  # type: ignore[arg-type]
