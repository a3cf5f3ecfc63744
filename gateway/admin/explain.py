"""Where a call would be sent, and why: a dry run that calls no backend and counts towards no limit."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gateway.auth.key import BATCH, Key
from gateway.core.errors import CommandFailed, LimitReached, NoBackend, QueueFull, RouteNotServed
from gateway.dialects.dialect import Call, Operation
from gateway.dialects.model_names import ModelName, canonical
from gateway.dialects.tokens import NO_TOKENS, Need
from gateway.fleet.backends.backend import Backend
from gateway.fleet.caller import Caller
from gateway.fleet.catalog import Catalog, Model, Offer, short_digest
from gateway.fleet.claim import Claim
from gateway.fleet.claims import Claims
from gateway.fleet.forecast import Forecast, Terms
from gateway.fleet.presence import BackendState
from gateway.fleet.scheduler import Candidate, group_of, takes_slot
from gateway.fleet.ways import CHATS, Way, way_of
from gateway.limits.admission import Admission, CounterUsage, Ticket
from gateway.limits.limiter import Limiter
from gateway.limits.quota import NAMES, CounterSet, Quota
from gateway.proxy.visibility import missing
from gateway.stores.redis_client import RedisUnavailable

UNKNOWN_STATE = BackendState()
NO_OFFER: Sequence[Offer | None] = (None,)
# Bodies that ask for an answer: servers that have the routes of an agent's API may not take what is of another.
MESSAGES, INPUT = {"messages": [{"role": "user", "content": "x"}]}, {"input": "x"}
ORDINARY: Mapping[str, dict[str, Any]] = {
    "/v1/messages": MESSAGES,
    "/v1/messages/count_tokens": MESSAGES,
    "/v1/responses": INPUT,
    "/v1/responses/input_tokens": INPUT,
}
IN_OTHER_APIS = {**MESSAGES, **INPUT, "prompt": "x"}


@dataclass(frozen=True)
class Question:
    """A call of a key: `prompt` and `output` are its tokens; `output` is None if the call sets no maximum."""

    key: Key
    asked: str
    operation: Operation
    prompt: int = 1
    output: int | None = None

    @property
    def model(self) -> ModelName:
        return canonical(self.asked)

    def call(self) -> Call:
        """An ordinary one, of a conversation that nobody knows."""
        call = Call(self.operation, self.asked, self.model, False, ORDINARY.get(self.operation.path, IN_OTHER_APIS))
        call.needs = Need(self.prompt, self.output)
        return call

    def way(self, offer: Offer) -> Way | None:
        """How a backend would be asked for the answer."""
        return way_of(offer, self.call())

    def caller(self) -> Caller:
        return Caller(self.key.id, "explain", self.key.weight, is_batch=BATCH in self.key.flags)


@dataclass(frozen=True)
class Fleet:
    """What is known about the backends, in the order of the configuration; `forecast` is what would become of a claim."""

    backends: Sequence[Backend]
    states: Mapping[str, BackendState]
    drained: frozenset[str]
    catalog: Catalog
    claims: Claims
    forecast: Callable[[Claim], Awaitable[Forecast]]


class Copy(NamedTuple):
    """A backend with its copy of the model, None if it has none that may answer; and what is said of it."""

    backend: Backend
    offer: Offer | None
    row: dict[str, Any]


def operation_of(client: str, operations: Mapping[str, Operation]) -> Operation:
    """A dialect's chat, or any route by its path. Raises CommandFailed."""
    path = CHATS.get(client, client)
    if path not in operations:
        routes = ", ".join(sorted(operations))
        raise CommandFailed(f"{client[:64]!r} is not a client or a route: write {', '.join(CHATS)}, or one of {routes}")
    return operations[path]


def copies(question: Question, fleet: Fleet) -> list[Copy]:
    """All backends; in the row of each `serves`, `order` (in which they are tried, from 1) and the reason in words."""
    model = fleet.catalog.lookup(question.model)
    offers = list(model.offers) if model else []
    # The models of an alias may have several offers of one backend.
    of_each = [(one, [offer for offer in offers if offer.backend == one.name] or NO_OFFER) for one in fleet.backends]
    found = [Copy(one, offer, _row(one, offer, question, fleet)) for one, own in of_each for offer in own]
    # Backends whose breaker is open come last, in the same order.
    tried = sorted(
        (copy.row["breaker"] == "open", offers.index(copy.offer), number)
        for number, copy in enumerate(found)
        if copy.offer and copy.row["serves"]
    )
    for order, (*_, number) in enumerate(tried, 1):
        found[number].row["order"] = order
    return found


def _row(backend: Backend, offer: Offer | None, question: Question, fleet: Fleet) -> dict[str, Any]:
    state = fleet.states.get(backend.name, UNKNOWN_STATE)
    why_not = _why_not(backend, offer, question, fleet, state)
    way = question.way(offer) if offer else None
    return {
        "backend": backend.name,
        "serves": not why_not,
        "order": None,
        "why": why_not or _why(state),
        "spelling": offer.spelling if offer else None,
        "translated_to": way.path if way and way.translator else None,
        "breaker": state.breaker,
        "open_for_s": state.open_for_s,
        "in_flight": state.in_flight,
        "max_connections": backend.config.max_connections,
        "estimate": None,
    }


def _why_not(backend: Backend, offer: Offer | None, question: Question, fleet: Fleet, state: BackendState) -> str:
    if offer is None:
        return _why_no_offer(backend.name, question, fleet.catalog)
    if offer.good_until <= time.time():
        return "its list of models is too old: it has not answered recently"
    if backend.name in fleet.drained:
        return "drained by an operator"
    if question.way(offer) is None:
        return f"has no route {question.operation.path}"
    if state.in_flight >= backend.config.max_connections:
        return f"full: {state.in_flight} of {backend.config.max_connections} requests in progress"
    return ""


def _why_no_offer(name: str, question: Question, catalog: Catalog) -> str:
    snapshot = next((snapshot for snapshot in catalog.snapshots if snapshot.backend == name), None)
    if snapshot is None or not snapshot.answered_at:
        return f"has never answered: {snapshot.error}" if snapshot and snapshot.error else "has never answered"
    for model in _alias_of(question, catalog) or [question.model.canonical]:
        digests = dict(catalog.different.get(model, ()))
        first = next((offer for offer in catalog.models[model].offers if offer.digest), None) if name in digests else None
        if first is not None:
            own, other = short_digest(digests[name]), short_digest(first.digest)
            return f"its copy of {model} differs: {own}, not {other} as on {first.backend} (DIGEST_PARITY=distinct)"
    return "does not have this model"


def _why(state: BackendState) -> str:
    if state.breaker == "open":
        return f"last resort: its breaker is open for {state.open_for_s:.1f} s more"
    return "its breaker lets one trial request through" if state.breaker == "half-open" else "ready"


async def explain(question: Question, fleet: Fleet, limits: Limiter, defaults: Quota, most_output: int) -> dict[str, Any]:
    """The whole explanation; `status` and `backend` are those of the call if it came now and the backend answered."""
    found = copies(question, fleet)
    model = fleet.catalog.find(question.model, question.key.models)
    story: dict[str, Any] = {
        "key": {"id": question.key.id, "name": question.key.name},
        "route": question.operation.path,
        "model": question.asked,
        "canonical": question.model.canonical,
        "alias_of": _alias_of(question, fleet.catalog),
        "model_is_known": fleet.catalog.lookup(question.model) is not None,
        "key_may_use_it": question.key.models.allows(question.model.canonical, cloud=_is_cloud(question, fleet.catalog)),
        "backends": [copy.row for copy in found],
        "routing": None,
        "most_tokens": min(most_output, question.output or most_output),
        "limits": [],
        "limits_decided_by": "Redis",
        "refused_by": None,
        "passes_in_s": None,
    }
    refusal = await _limits(question, model, limits, (defaults, most_output), story)
    if question.key.has_expired(time.time()):
        return {**story, **_verdict(401, "invalid_api_key")}
    if refusal is not None:
        story |= {"refused_by": refusal.limit, "passes_in_s": refusal.retry_after}
        return {**story, **_verdict(429, refusal.code)}
    if model is None:
        refused = missing(question.asked, question.key, fleet.catalog)
        return {**story, **_verdict(refused.status, refused.code)}
    return {**story, **await _outcome(found, model, question, fleet)}


def _alias_of(question: Question, catalog: Catalog) -> list[str]:
    """The models that an alias leads to, whether any backend has them or not."""
    alias = catalog.aliases.of(question.model)
    is_hidden = alias is not None and alias.is_glob and question.model.canonical in catalog.models
    return [] if alias is None or is_hidden else list(alias.targets)


def _is_cloud(question: Question, catalog: Catalog) -> bool:
    known = catalog.lookup(question.model)
    return question.model.cloud or (known is not None and known.name.cloud)


async def _outcome(found: Sequence[Copy], model: Model, question: Question, fleet: Fleet) -> dict[str, Any]:
    if not any(question.way(offer) for offer in model.offers):
        return _verdict(400, RouteNotServed.code)
    tried = sorted((copy for copy in found if copy.row["serves"]), key=lambda copy: copy.row["order"])
    if not tried:
        return _verdict(503, NoBackend.code)
    if not takes_slot(question.operation):
        return _verdict(200, "answered", tried[0].backend.name)
    # Those whose breaker is open are asked only if there is no other.
    ready = [copy for copy in tried if copy.row["breaker"] != "open"] or tried
    candidates = [Candidate(copy.backend, copy.offer) for copy in ready if copy.offer]
    foreseen = await fleet.forecast(fleet.claims.claim(question.call(), group_of(model), question.caller(), candidates))
    by_place = {(terms.backend, terms.model): terms for terms in foreseen.places}
    for copy in ready:
        terms = by_place.get((copy.backend.name, copy.offer.model)) if copy.offer else None
        copy.row["estimate"] = _estimate(terms) if terms else None
    is_refused = foreseen.is_full and foreseen.position > 0
    verdict = _verdict(503, QueueFull.code) if is_refused else _verdict(200, "answered", foreseen.chosen.backend)
    return {**verdict, "routing": _routing(foreseen, fleet.claims.routing.mode)}


def _estimate(terms: Terms) -> dict[str, Any]:
    facts = terms._asdict()
    return {name: value for name, value in facts.items() if name not in ("backend", "is_chosen")}


def _routing(foreseen: Forecast, mode: str) -> dict[str, Any]:
    return {
        "mode": mode,
        "decided_by": "Redis" if foreseen.is_exact else "this process alone: Redis is unreachable",
        "backend": foreseen.chosen.backend,
        "chosen_because": foreseen.chosen.why,
        "position": foreseen.position,
        "waiting": foreseen.waiting,
        "waiting_tokens": foreseen.tokens,
        "wait_s": foreseen.wait_s,
        "first_token_s": foreseen.first_token_s,
    }


def _verdict(status: int, code: str, backend: str = "") -> dict[str, Any]:
    return {"status": status, "outcome": code, "backend": backend}


async def _limits(
    question: Question, model: Model | None, limits: Limiter, bounds: tuple[Quota, int], story: dict[str, Any]
) -> LimitReached | None:
    """`bounds`: the default limits, and the most tokens of an answer. A call for an unknown model counts as a request only."""
    defaults, most_output = bounds
    name = question.model.canonical if model else ""
    counter_sets = question.key.counter_sets(name, defaults)
    output = None if question.output is None else min(question.output, most_output)
    need, info = (Need(question.prompt, output), b"explain") if model else (NO_TOKENS, b"")
    used: Sequence[CounterUsage | None] = [None] * len(counter_sets)
    found: Admission | LimitReached | None = None
    try:
        found, used = await limits.preview(Ticket("explain", counter_sets, name, need, info))
    except RedisUnavailable:
        story["limits_decided_by"] = "each process by itself: Redis is unreachable"
    story["limits"] = [
        row for counter_set, some in zip(counter_sets, used, strict=True) for row in _limit_rows(counter_set, some)
    ]
    return found if isinstance(found, LimitReached) else None


def _limit_rows(counter_set: CounterSet, used: CounterUsage | None) -> list[dict[str, Any]]:
    """Each limit that is set, with its current use if known."""
    whose = counter_set.name.partition("|")[2] or "all"
    return [
        {"models": whose, "limit": name, "of": getattr(counter_set, name), "used": getattr(used, name, None)}
        for name in NAMES
        if getattr(counter_set, name) >= 0
    ]
