"""Limits without Redis: each process counts in its own memory and enforces its share."""

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from gateway.limits.admission import Settlement, Ticket, WindowUsage
from gateway.limits.quota import CounterSet

WINDOW_S = 60
REMEMBERED_COUNTER_SETS = 20_000


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
    counter_set: CounterSet
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
    """The usage of a counter set by Redis's last reply, and when that came."""

    at: float = -1e9
    requests: int = 0
    tokens: int = 0
    day: int = 0
    month: int = 0
    slots: int = 0
    day_ms: int = 0
    month_ms: int = 0


class Counters:
    """The state of one counter set in this process: what it has admitted without Redis since Redis's last reply."""

    def __init__(self) -> None:
        self.known = RedisUsage()
        self.requests, self.tokens = Window(), Window()
        self.reserved = self.reserved_ms = 0
        self.spent_day = self.spent_month = 0
        self.spent_day_ms = self.spent_month_ms = 0
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
        self._slots_taken: Counter[str] = Counter()

    def enter(self, counter_sets: Sequence[CounterSet]) -> None:
        """A call takes a slot in this process, whether Redis or this process admitted it."""
        for counter_set in counter_sets:
            self._slots_taken[counter_set.name] += 1

    def leave(self, counter_sets: Sequence[CounterSet]) -> None:
        for counter_set in counter_sets:
            self._slots_taken[counter_set.name] -= 1
            if not self._slots_taken[counter_set.name]:
                del self._slots_taken[counter_set.name]

    def has_slot(self, counter_sets: Sequence[CounterSet], share: Share) -> bool:
        """Whether one slot of each is left of this process's share."""
        return all(
            counter_set.concurrent < 0 or self._slots_taken[counter_set.name] < share.out_of(counter_set.concurrent)
            for counter_set in counter_sets
        )

    def slots(self, counter_set: CounterSet) -> int:
        """How many slots were in use according to Redis's last reply, including the call that it admitted."""
        counters = self._counters.get(counter_set.name)
        return counters.known.slots + 1 if counters else 1

    def note(
        self, counter_set: CounterSet, usage: WindowUsage, day: int, month: int, slots: int, day_ms: int, month_ms: int
    ) -> None:
        """Keeps the usage that Redis replied, in case it becomes unavailable."""
        counters = self._counters.get(counter_set.name) or self._of(counter_set)
        counters.known = RedisUsage(self._clock(), usage.requests, usage.tokens, day, month, slots, day_ms, month_ms)
        counters.spent_day = counters.spent_month = counters.spent_day_ms = counters.spent_month_ms = 0

    def admit(self, ticket: Ticket, tokens: int, share: Share) -> Refusal | None:
        """Takes from all counter sets or from none; `tokens` is -1 if the request counts none."""
        counter_sets, takes_slot = ticket.counter_sets, bool(ticket.info)
        refusals = [found for counter_set in counter_sets if (found := self._refusal(counter_set, tokens, share, takes_slot))]
        if refusals:
            return max(refusals, key=lambda refusal: float("inf") if refusal.wait_s is None else refusal.wait_s)
        now = self._clock()
        for counter_set in counter_sets:
            counters = self._of(counter_set)
            counters.requests.add(now, 1)
            counters.reserved += max(0, tokens)
            counters.reserved_ms += ticket.seconds_ms
        return None

    def settle(self, settlement: Settlement) -> None:
        admission, used, used_ms = settlement.admission, settlement.used, settlement.used_ms
        assert admission is not None
        for counter_set in admission.counter_sets:
            counters = self._of(counter_set)
            counters.reserved = max(0, counters.reserved - admission.reserved)
            counters.reserved_ms = max(0, counters.reserved_ms - admission.seconds_ms)
            counters.spent_day_ms += used_ms
            counters.spent_month_ms += used_ms
            if used:
                counters.tokens.add(self._clock(), used)
                counters.spent_day += used
                counters.spent_month += used

    def usages(self, counter_sets: Sequence[CounterSet]) -> list[WindowUsage]:
        now = self._clock()
        return [self._usage(self._of(counter_set), now) for counter_set in counter_sets]

    @staticmethod
    def _usage(counters: Counters, now: float) -> WindowUsage:
        requests, tokens = counters.requests.used(now), counters.tokens.used(now) + counters.reserved
        resets = (round(window.reset_s(now) * 1000) for window in (counters.requests, counters.tokens))
        return WindowUsage(requests, tokens, *resets)

    def _of(self, counter_set: CounterSet) -> Counters:
        counters = self._counters.get(counter_set.name)
        if counters is None:
            counters = self._counters[counter_set.name] = Counters()
            if len(self._counters) > REMEMBERED_COUNTER_SETS:
                self._counters.popitem(last=False)
        if counters.day != self._today():
            counters.day, counters.spent_day, counters.spent_day_ms = self._today(), 0, 0
            counters.known = counters.known._replace(day=0, day_ms=0)
        self._counters.move_to_end(counter_set.name)
        return counters

    def _refusal(self, counter_set: CounterSet, tokens: int, share: Share, takes_slot: bool) -> Refusal | None:
        now, counters = self._clock(), self._of(counter_set)
        rpm = share.out_of(max(0, counters.left(counter_set.rpm, counters.known.requests, now)))
        if counter_set.rpm >= 0 and (excess := counters.requests.used(now) + 1 - rpm) > 0:
            return Refusal("rpm", counter_set, counters.requests.until_gone(now, excess) if counter_set.rpm else None)
        if tokens >= 0 and (found := self._token_refusal(counter_set, counters, tokens, share, now)):
            return found
        if takes_slot and counter_set.limits_seconds and (spent := self._seconds_refusal(counter_set, counters, share)):
            return spent
        if (
            takes_slot
            and counter_set.concurrent >= 0
            and self._slots_taken[counter_set.name] >= share.out_of(counter_set.concurrent)
        ):
            return Refusal("concurrent", counter_set, 0.0 if counter_set.concurrent else None)
        return None

    @staticmethod
    def _token_refusal(counter_set: CounterSet, counters: Counters, tokens: int, share: Share, now: float) -> Refusal | None:
        held, known = counters.reserved + tokens, counters.known
        tpm = share.out_of(max(0, counters.left(counter_set.tpm, known.tokens, now)))
        if counter_set.tpm >= 0 and (excess := counters.tokens.used(now) + held - tpm) > 0:
            wait = counters.tokens.until_gone(now, excess)
            return Refusal("tpm", counter_set, wait if tokens <= counter_set.tpm and counter_set.tpm else None)
        if counter_set.day >= 0 and counters.spent_day + held > share.out_of(max(0, counter_set.day - known.day)):
            is_spent = known.day + counters.spent_day + tokens > counter_set.day
            wait = _until_next("day") if is_spent else 0.0
            return Refusal("day", counter_set, wait if tokens <= counter_set.day and counter_set.day else None)
        if counter_set.month >= 0 and counters.spent_month + held > share.out_of(max(0, counter_set.month - known.month)):
            is_spent = known.month + counters.spent_month + tokens > counter_set.month
            wait = _until_next("month") if is_spent else 0.0
            return Refusal("month", counter_set, wait if tokens <= counter_set.month and counter_set.month else None)
        return None

    @staticmethod
    def _seconds_refusal(counter_set: CounterSet, counters: Counters, share: Share) -> Refusal | None:
        """How long a call takes is not known: it passes if anything is left of this process's share."""
        known, held = counters.known, counters.reserved_ms
        for limit, span, most_s, known_ms, spent_ms in (
            ("day_seconds", "day", counter_set.day_seconds, known.day_ms, counters.spent_day_ms),
            ("month_seconds", "month", counter_set.month_seconds, known.month_ms, counters.spent_month_ms),
        ):
            if most_s < 0 or spent_ms + held < share.out_of(max(0, most_s * 1000 - known_ms)):
                continue
            wait = _until_next(span) if known_ms + spent_ms >= most_s * 1000 else 0.0
            return Refusal(limit, counter_set, wait if most_s else None)
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
