"""What a check finds: it is fine, or there is a warning or a problem; a check that fails or hangs is a problem too."""

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "problem"]

DEADLINE_S, GROUP_DEADLINE_S = 6.0, 10.0
CLOCK_WARNING_S, CLOCK_PROBLEM_S = 2.0, 30.0


@dataclass(frozen=True)
class Finding:
    """One line of the table; `advice` says what to do next."""

    check: str
    state: State
    found: str
    advice: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "warning", found, advice)


def problem(check: str, found: str, advice: str) -> Finding:
    return Finding(check, "problem", found, advice)


async def guarded(check: str, work: Awaitable[list[Finding]], advice: str, *, deadline_s: float = DEADLINE_S) -> list[Finding]:
    """The findings of the work; an exception or a timeout becomes a problem with this advice."""
    try:
        async with asyncio.timeout(deadline_s):
            return await work
    except TimeoutError:
        return [problem(check, f"no answer within {deadline_s:g} s", advice)]
    except Exception as error:  # noqa: BLE001 # one failing check must not hide the findings of others
        return [problem(check, described(error), advice)]


def described(error: BaseException) -> str:
    """The exception's type and the first line of its message."""
    cause = error.__cause__ or error
    line = str(cause).partition("\n")[0]
    return f"{type(cause).__name__}: {line[:120]}" if line else type(cause).__name__


def clock(check: str, ahead_s: float) -> Finding:
    """Expiry, limits and audit compare the times of several machines."""
    direction = "ahead of" if ahead_s > 0 else "behind"
    found = f"{abs(ahead_s):.1f} s {direction} this machine's"
    advice = "synchronize the clocks of both machines with NTP"
    if abs(ahead_s) > CLOCK_PROBLEM_S:
        return problem(check, found, advice)
    return warning(check, found, advice) if abs(ahead_s) > CLOCK_WARNING_S else ok(check, found)
