"""Limits without Redis: each process counts in its own memory and enforces its share."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from gateway.limits.admission import WindowUsage
from gateway.limits.quota import CounterSet

WINDOW_S = 60
REMEMBERED_SCOPES = 20_000


class Share(NamedTuple):
    """This process is number `rank`, from 0, of `of`; the shares of all add up to the limit."""

    rank: int = 0
    of: int = 1

    def out_of(self, limit: int) -> int:
        return limit // self.of + (1 if self.rank < limit % self.of else 0)


WHOLE = Share()


class Refusal(NamedTuple):
    """`wait_s` is None if the request can never pass, 0 if the wait is unknown: it depends on running calls or on Redis."""

    limit: str
    scope: CounterSet
    wait_s: float | None


class Window:
    """Counts of the last minute, by second."""

    def __init__(self) -> None:
        self._counts: deque[list[float]] = deque()
        self.sum = 0

    def add(self, now: float, count: int) -> None:
        if self._counts and self._counts[-1][0] == now // 1:
            self._counts[-1][1] += count
        else:
            self._counts.append([now // 1, count])
        self.sum += count

    def used(self, now: float) -> int:
        while self._counts and self._counts[0][0] < now // 1 - WINDOW_S:
            self.sum -= int(self._counts.popleft()[1])
        return self.sum

    def until_gone(self, now: float, count: int) -> float:
        """Seconds until so many have left the window; 0 if it does not hold so many."""
        for second, some in self._counts:
            count -= int(some)
            if count <= 0:
                return second + WINDOW_S + 1 - now
        return 0.0

    def reset_s(self, now: float) -> float:
        return self._counts[-1][0] + WINDOW_S + 1 - now if self._counts else 0.0


class RedisUsage(NamedTuple):
    """The usage of a scope by Redis's last reply, and when that came."""

    at: float = -1e9
    requests: int = 0
    tokens: int = 0
    day: int = 0
    month: int = 0
    slots: int = 0


class Counters:
    """The state of one scope in this process: what it has admitted without Redis since Redis's last reply."""

    def __init__(self) -> None:
        self.known = RedisUsage()
        self.requests, self.tokens = Window(), Window()
        self.reserved = 0
        self.spent_day = self.spent_month = 0
        self.day = 0

    def left(self, limit: int, used: int, now: float) -> int:
        """What was left by Redis's last reply; after a minute all of the limit is left again."""
        return limit - used if now - self.known.at <= WINDOW_S else limit


class FallbackLimiter:
    def __init__(
        self, clock: Callable[[], float] = time.monotonic, today: Callable[[], int] = lambda: int(time.time() // 86_400)
    ):
        self._clock, self._today = clock, today
        self._counters: OrderedDict[str, Counters] = OrderedDict()
        self._running: Counter[str] = Counter()

    def enter(self, scopes: Sequence[CounterSet]) -> None:
        """A call takes a slot in this process, whether Redis or this process admitted it."""
        for scope in scopes:
            self._running[scope.name] += 1

    def leave(self, scopes: Sequence[CounterSet]) -> None:
        for scope in scopes:
            self._running[scope.name] -= 1
            if not self._running[scope.name]:
                del self._running[scope.name]

    def slots(self, scope: CounterSet) -> int:
        """How many slots were taken by Redis's last reply, with the call that it admitted."""
        counters = self._counters.get(scope.name)
        return counters.known.slots + 1 if counters else 1

    def note(self, scope: CounterSet, usage: WindowUsage, day: int, month: int, slots: int) -> None:
        """Keeps the usage that Redis replied, in case it becomes unavailable."""
        counters = self._counters.get(scope.name) or self._of(scope)
        counters.known = RedisUsage(self._clock(), usage.requests, usage.tokens, day, month, slots)
        counters.spent_day = counters.spent_month = 0

    def admit(self, scopes: Sequence[CounterSet], tokens: int, share: Share, *, takes_slot: bool) -> Refusal | None:
        """Takes from all scopes or from none; `tokens` is -1 if the request counts none."""
        refusals = [found for scope in scopes if (found := self._refusal(scope, tokens, share, takes_slot))]
        if refusals:
            return max(refusals, key=lambda refusal: float("inf") if refusal.wait_s is None else refusal.wait_s)
        now = self._clock()
        for scope in scopes:
            counters = self._of(scope)
            counters.requests.add(now, 1)
            counters.reserved += max(0, tokens)
        return None

    def settle(self, scopes: Sequence[CounterSet], reserved: int, used: int) -> None:
        for scope in scopes:
            counters = self._of(scope)
            counters.reserved = max(0, counters.reserved - reserved)
            if used:
                counters.tokens.add(self._clock(), used)
                counters.spent_day += used
                counters.spent_month += used

    def usages(self, scopes: Sequence[CounterSet]) -> list[WindowUsage]:
        now = self._clock()
        return [self._usage(self._of(scope), now) for scope in scopes]

    @staticmethod
    def _usage(counters: Counters, now: float) -> WindowUsage:
        requests, tokens = counters.requests.used(now), counters.tokens.used(now) + counters.reserved
        resets = (round(window.reset_s(now) * 1000) for window in (counters.requests, counters.tokens))
        return WindowUsage(requests, tokens, *resets)

    def _of(self, scope: CounterSet) -> Counters:
        counters = self._counters.get(scope.name)
        if counters is None:
            counters = self._counters[scope.name] = Counters()
            if len(self._counters) > REMEMBERED_SCOPES:
                self._counters.popitem(last=False)
        if counters.day != self._today():
            counters.day, counters.spent_day, counters.known = self._today(), 0, counters.known._replace(day=0)
        self._counters.move_to_end(scope.name)
        return counters

    def _refusal(self, scope: CounterSet, tokens: int, share: Share, takes_slot: bool) -> Refusal | None:
        now, counters = self._clock(), self._of(scope)
        rpm = share.out_of(max(0, counters.left(scope.rpm, counters.known.requests, now)))
        if scope.rpm >= 0 and (excess := counters.requests.used(now) + 1 - rpm) > 0:
            return Refusal("rpm", scope, counters.requests.until_gone(now, excess) if scope.rpm else None)
        if tokens >= 0 and (found := self._token_refusal(scope, counters, tokens, share, now)):
            return found
        if takes_slot and scope.concurrent >= 0 and self._running[scope.name] >= share.out_of(scope.concurrent):
            return Refusal("concurrent", scope, 0.0 if scope.concurrent else None)
        return None

    @staticmethod
    def _token_refusal(scope: CounterSet, counters: Counters, tokens: int, share: Share, now: float) -> Refusal | None:
        held, known = counters.reserved + tokens, counters.known
        tpm = share.out_of(max(0, counters.left(scope.tpm, known.tokens, now)))
        if scope.tpm >= 0 and (excess := counters.tokens.used(now) + held - tpm) > 0:
            wait = counters.tokens.until_gone(now, excess)
            return Refusal("tpm", scope, wait if tokens <= scope.tpm and scope.tpm else None)
        if scope.day >= 0 and counters.spent_day + held > share.out_of(max(0, scope.day - known.day)):
            is_spent = known.day + counters.spent_day + tokens > scope.day
            wait = _until_next("day") if is_spent else 0.0
            return Refusal("day", scope, wait if tokens <= scope.day and scope.day else None)
        if scope.month >= 0 and counters.spent_month + held > share.out_of(max(0, scope.month - known.month)):
            is_spent = known.month + counters.spent_month + tokens > scope.month
            wait = _until_next("month") if is_spent else 0.0
            return Refusal("month", scope, wait if tokens <= scope.month and scope.month else None)
        return None


def _until_next(span: str) -> float:
    """Seconds until the day or month ends, in UTC."""
    now = datetime.now(UTC)
    begun = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if span == "month":
        begun = begun.replace(day=1)
        ends = begun.replace(year=begun.year + begun.month // 12, month=begun.month % 12 + 1)
    else:
        ends = begun + timedelta(days=1)
    return (ends - now).total_seconds()
