"""Gets slots for calls, and describes them anew while they wait."""

from collections.abc import Callable, Sequence

from gateway.dialects.dialect import Call
from gateway.fleet.caller import Caller
from gateway.fleet.claim import Claim
from gateway.fleet.claims import Claims
from gateway.fleet.queue import FleetQueue
from gateway.fleet.scheduler import Candidate
from gateway.fleet.slot import Slot
from gateway.fleet.waiting import Queued


class Placing:
    def __init__(self, queue: FleetQueue, claims: Claims) -> None:
        self.queue, self.claims = queue, claims

    async def slot_for(
        self,
        claim: Claim,
        call: Call,
        caller: Caller,
        renewed: Callable[[], Sequence[Candidate]],
        queued: Callable[[Queued], None],
    ) -> tuple[Slot, Candidate] | None:
        """A slot of one of the claim's candidates, which are renewed while the call waits; None if none is left.

        Raises QueueFull, QueueTimeout and NoBackend.
        """

        def claim_now() -> Claim | None:
            fresh = renewed()
            if not fresh:
                return None
            claim.places = self.claims.places(call, caller, fresh)
            return claim

        while True:
            slot = await self.queue.get(claim, claim_now, caller.key_slot, queued)
            for place in claim.places:
                if place.name == (slot.backend, slot.model):
                    return slot, place.candidate
            # Its backend has been withdrawn meanwhile.
            slot.free()
            if claim_now() is None:
                return None
