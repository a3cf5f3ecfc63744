"""What a call asks of the fleet: a slot of one of several places, each with what the call would cost there. No I/O."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gateway.fleet.affinity import Conversation
from gateway.fleet.scheduler import Candidate

NOWHERE = Conversation()


class Routing(NamedTuple):
    """How backends are chosen, and how long calls wait for them.

    `mode` is "order", "warm" or "fast"; `spill_s` is what a lower tier must save, None for never; `sticky_s` is how long the
    place of a conversation is remembered. At most `queue_size` calls with `queue_tokens` tokens of prompts wait for one group
    of backends, each for at most `wait_s`.
    """

    mode: str = "order"
    spill_s: float | None = None
    sticky_s: float = 600.0
    wait_s: float = 300.0
    queue_size: int = 512
    queue_tokens: int = 4_000_000


class Place(NamedTuple):
    """A candidate with the costs of the call there: to load the model, for a token of the prompt, and for the answer."""

    candidate: Candidate
    tier: int
    load_ms: int
    prefill_us: int
    service_ms: int

    @property
    def name(self) -> tuple[str, str]:
        return self.candidate.place

    def arguments(self) -> tuple[Any, ...]:
        backend, offer = self.candidate.backend.name, self.candidate.offer
        costs = self.load_ms, self.prefill_us, self.service_ms
        return (backend, offer.model, self.tier, offer.slots, int(offer.swaps), offer.size, *costs)


@dataclass(slots=True)
class Claim:
    """One call's claim; `client` is whom the fair order knows it by, and `sub_user` one of that client's users.

    `id` is its name on the board, another each time it is put there. `arrived_ms` is when it joined the queue by the clock of
    Redis, 0 before. `patience_ms` is how long it may still wait.
    """

    call: str
    group: str
    client: str
    places: Sequence[Place]
    weight: float = 1.0
    sub_user: str = ""
    is_batch: bool = False
    prompt: int = 0
    conversation: Conversation = field(default=NOWHERE, repr=False)
    arrived_ms: int = 0
    patience_ms: int = 0
    id: str = ""

    def arguments(self, routing: Routing, process: str) -> list[Any]:
        """The arguments of take.lua and ask.lua after the time."""
        spill = -1 if routing.spill_s is None else int(routing.spill_s * 1000)
        sticky = int(routing.sticky_s * 1000) if routing.mode == "fast" else 0
        known = self.conversation
        shared, tokens = known.shared or ("", 0)
        values = [routing.mode, process, self.id, self.group, self.client, self.sub_user, self.weight, int(self.is_batch)]
        values += [self.patience_ms, routing.queue_size, routing.queue_tokens, self.prompt, spill, sticky, self.arrived_ms]
        values += [known.full, shared, tokens, len(known.prefixes)]
        for prefix in known.prefixes:
            values += prefix
        for place in self.places:
            values += place.arguments()
        return values

    def cost_ms(self, place: Place) -> float:
        """What the call takes of a place that has its model and nothing of its prompt."""
        return self.prompt * place.prefill_us / 1000 + place.service_ms
