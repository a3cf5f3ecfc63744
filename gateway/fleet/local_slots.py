"""Slots without Redis: this process hands out its share of each, to its own calls in the order of their arrival."""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable

from gateway.fleet.claim import Claim, Place, Routing
from gateway.fleet.waiting import Waiting

REMEMBERED_CONVERSATIONS = 10_000

# How much of a number of slots is this process's.
ShareOf = Callable[[int], int]
IsResident = Callable[[str, str], bool]


class LocalSlots:
    """Counts the calls of this process at each place, whether Redis or this process let them begin."""

    def __init__(self, routing: Routing, share_of: ShareOf, is_resident: IsResident) -> None:
        self._routing, self._share_of, self._is_resident = routing, share_of, is_resident
        self._running: Counter[tuple[str, str]] = Counter()
        self._homes: OrderedDict[str, tuple[str, str]] = OrderedDict()
        self.waiting: deque[Waiting] = deque()

    def enter(self, place: tuple[str, str], conversation: str = "") -> None:
        self._running[place] += 1
        if conversation:
            self._homes[conversation] = place
            self._homes.move_to_end(conversation)
            if len(self._homes) > REMEMBERED_CONVERSATIONS:
                self._homes.popitem(last=False)

    def leave(self, place: tuple[str, str]) -> None:
        self._running[place] -= 1
        if self._running[place] <= 0:
            del self._running[place]

    def running(self, place: tuple[str, str]) -> int:
        return self._running[place]

    @property
    def mode(self) -> str:
        return self._routing.mode

    @property
    def most_waiting(self) -> int:
        return self._routing.queue_size

    def share(self, place: Place) -> int:
        """This process's slots: one at least, so that nobody waits for ever."""
        return max(1, self._share_of(place.candidate.offer.slots))

    def has(self, place: Place) -> bool:
        """Whether the model is loaded there."""
        return not place.candidate.offer.swaps or self._is_resident(*place.name)

    def free_place(self, claim: Claim) -> Place | None:
        """The place for a call that may begin now."""
        free = [place for place in claim.places if self._running[place.name] < self.share(place)]
        if self._routing.mode == "order" or not free:
            return free[0] if free else None
        return min((place for place in free if place.tier == free[0].tier), key=lambda place: self._rank(claim, place))

    def _rank(self, claim: Claim, place: Place) -> int:
        """A conversation's own place first, then those that have the model."""
        if any(self._homes.get(prefix) == place.name for prefix, _ in claim.conversation.prefixes):
            return 0
        return 1 if self.has(place) else 2

    def ready(self) -> Iterable[tuple[Waiting, Place]]:
        """The calls that wait here and may begin now, each with its place; they are taken out as they are given."""
        for waiting in list(self.waiting):
            place = self.free_place(waiting.claim)
            if place is not None:
                self.waiting.remove(waiting)
                yield waiting, place
