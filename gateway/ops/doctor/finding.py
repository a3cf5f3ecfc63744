"""What a check of the installation finds: fine, a warning or a problem; a check that fails or hangs is a finding too."""

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
    """What the work finds; whatever it raises, and its silence, is a problem with this advice."""
    try:
        async with asyncio.timeout(deadline_s):
            return await work
    except TimeoutError:
        return [problem(check, f"no answer within {deadline_s:g} s", advice)]
    except Exception as wrong:  # noqa: BLE001 # one check that breaks must not hide what the others find
        return [problem(check, words(wrong), advice)]


def words(wrong: BaseException) -> str:
    """The kind of what went wrong, and the first line of what it says."""
    cause = wrong.__cause__ or wrong
    line = str(cause).partition("\n")[0]
    return f"{type(cause).__name__}: {line[:120]}" if line else type(cause).__name__


def clock(check: str, ahead_s: float) -> Finding:
    """Expiry, limits and audit are timed on several machines."""
    direction = "ahead of" if ahead_s > 0 else "behind"
    found = f"{abs(ahead_s):.1f} s {direction} this machine's"
    advice = "let one time service (NTP) set the clocks of both machines"
    if abs(ahead_s) > CLOCK_PROBLEM_S:
        return problem(check, found, advice)
    return warning(check, found, advice) if abs(ahead_s) > CLOCK_WARNING_S else ok(check, found)
