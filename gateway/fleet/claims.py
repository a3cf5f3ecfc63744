"""Describes calls as claims: what each would cost at its candidates."""

from collections.abc import Sequence

from gateway.dialects.dialect import Call
from gateway.fleet.affinity import conversation
from gateway.fleet.caller import Caller
from gateway.fleet.claim import NOWHERE, Claim, Place, Routing
from gateway.fleet.costs import Costs
from gateway.fleet.scheduler import Candidate, first_choice


class Claims:
    """`salt` makes the names of conversations meaningless elsewhere; `has_tiers` is whether some backends are equals."""

    def __init__(self, routing: Routing, costs: Costs, salt: bytes, *, has_tiers: bool) -> None:
        self.routing, self._costs, self._salt = routing, costs, salt
        # If no two backends are equals, no tier is meant: it would leave nothing to choose.
        self._one_tier = routing.mode == "warm" and not has_tiers

    def claim(self, call: Call, group: str, caller: Caller, candidates: Sequence[Candidate]) -> Claim:
        prompt = max(0, call.needs.prompt)
        known = NOWHERE
        if self.routing.mode == "fast" and self.routing.sticky_s:
            known = conversation(call.body, caller.headers, caller.id, self._salt, prompt_tokens=prompt)
        claim = Claim(caller.call, group, caller.id, self.places(call, caller, candidates), conversation=known)
        claim.weight, claim.sub_user, claim.is_batch, claim.prompt = caller.weight, caller.sub_user, caller.is_batch, prompt
        claim.patience_ms = int(self.routing.wait_s * 1000)
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
