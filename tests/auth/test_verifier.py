"""The queues in front of argon2."""

import asyncio
from collections import Counter

import pytest
from argon2 import PasswordHasher

from gateway.auth import key_format, verifier
from gateway.auth.verifier import Verifier
from gateway.core.errors import Overloaded


def test_cancelled_refused_and_timed_out_callers_hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verifier, "LONGEST_WAIT_S", 0.05)
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    key, other = key_format.mint(), key_format.mint()

    async def run() -> set[str]:
        subject = Verifier(hasher)
        stored = hasher.hash(key.whole)
        ends: set[str] = set()
        for seconds in (0.0, 0.001, 0.01):
            unknown = [asyncio.create_task(subject.is_right(None, key_format.mint())) for _ in range(12)]
            wrong = [asyncio.create_task(subject.is_right(stored, other)) for _ in range(12)]
            await asyncio.sleep(seconds)
            for task in (*unknown[::2], *wrong[::3]):
                task.cancel()
            found = await asyncio.gather(*unknown, *wrong, return_exceptions=True)
            ends |= {type(one).__name__ if isinstance(one, BaseException) else str(one) for one in found}
        await asyncio.sleep(0.2)
        assert (subject._in_progress, subject._locks, subject._unknown_lock.locked()) == (Counter(), {}, False)
        assert [await subject.is_right(*asked) for asked in ((stored, key), (stored, other), (None, other))] == [
            True,
            False,
            False,
        ]
        subject.close()
        return ends

    assert asyncio.run(run()) <= {"False", "Overloaded", "CancelledError"}


def test_a_wrong_key_is_refused_while_the_queue_of_unknown_ids_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is counted and cached, and argon2 does not run for it again."""
    monkeypatch.setattr(verifier, "MOST_UNKNOWN", 0)
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    good, wrong = key_format.mint(), key_format.mint()

    async def run() -> list[bool]:
        subject = Verifier(hasher)
        try:
            with pytest.raises(Overloaded):
                await subject.is_right(None, wrong)
            return [await subject.is_right(hasher.hash(good.whole), each) for each in (good, wrong)]
        finally:
            subject.close()

    assert asyncio.run(run()) == [True, False]
