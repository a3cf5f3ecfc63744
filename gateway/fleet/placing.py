"""Gets slots for calls: describes what each call would cost at its candidates, and asks the queue."""

from collections.abc import Callable, Sequence

from gateway.dialects.dialect import Call
from gateway.fleet.affinity import conversation
from gateway.fleet.caller import Caller
from gateway.fleet.claim import NOWHERE, Claim, Place
from gateway.fleet.costs import Costs
from gateway.fleet.queue import FleetQueue
from gateway.fleet.scheduler import Candidate, first_choice
from gateway.fleet.slot import Slot
from gateway.fleet.waiting import Queued


class Placing:
    """`salt` makes the names of conversations meaningless elsewhere; `has_tiers` is whether some backends are equals."""

    def __init__(self, queue: FleetQueue, costs: Costs, salt: bytes, *, has_tiers: bool) -> None:
        self.queue, self._costs, self._salt = queue, costs, salt
        # If no two backends are equals, no tier is meant: it would leave nothing to choose.
        self._one_tier = queue.routing.mode == "warm" and not has_tiers

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
            claim.places = self.places(call, caller, fresh)
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

    def claim(self, call: Call, group: str, caller: Caller, candidates: Sequence[Candidate]) -> Claim:
        prompt = max(0, call.needs.prompt)
        known = NOWHERE
        if self.queue.routing.mode == "fast" and self.queue.routing.sticky_s:
            known = conversation(call.body, caller.headers, caller.id, self._salt, prompt_tokens=prompt)
        claim = Claim(caller.call, group, caller.id, self.places(call, caller, candidates), conversation=known)
        claim.weight, claim.sub_user, claim.is_batch, claim.prompt = caller.weight, caller.sub_user, caller.is_batch, prompt
        claim.patience_ms = int(self.queue.routing.wait_s * 1000)
        return claim

    def places(self, call: Call, caller: Caller, candidates: Sequence[Candidate]) -> list[Place]:
        output = self._costs.predicted_output(caller.id, call.model.canonical, call.needs.output)
        return [self._place(candidate, output) for candidate in first_choice(candidates)]

    def _place(self, candidate: Candidate, output: float) -> Place:
        offer = candidate.offer
        rates = self._costs.rates(offer.backend, offer.model, offer.size)
        prefill_us = int(1_000_000 * rates.prompt_ratio / rates.prefill_tps)
        tier = 1 if self._one_tier else offer.tier
        return Place(candidate, tier, int(rates.load_s * 1000), prefill_us, int(1000 * output / rates.decode_tps))
