"""Finds a backend that answers a call: claims one, sends, reads the first frame; if that fails, tries the next."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

from gateway.core.cancel_scope import CallScope, CancelScope
from gateway.core.errors import (
    AnswerTooLarge,
    BackendCannot,
    BackendFailed,
    BackendRefused,
    BackendTimeout,
    BadRequest,
    GatewayError,
    NoBackend,
    RouteNotServed,
)
from gateway.core.shared_bytes import Reservation
from gateway.dialects.dialect import Call, Dialect
from gateway.dialects.translation import translators
from gateway.dialects.translation.translation import Translation
from gateway.dialects.translation.translators import Translator
from gateway.fleet.attempt import CANNOT, NOT_SENT, Attempt
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault, BackendResponse
from gateway.fleet.caller import Caller
from gateway.fleet.catalog import Model
from gateway.fleet.claim import Claim
from gateway.fleet.held_answers import HeldAnswers
from gateway.fleet.loaded_models import LoadedModels
from gateway.fleet.opening import NO_ROUTE, Busy, Opening, Upstream, read_beginning
from gateway.fleet.placing import Placing
from gateway.fleet.scheduler import Candidate, choose, group_of, is_served, takes_slot
from gateway.fleet.slot import Slot
from gateway.fleet.translated_response import TranslatedResponse
from gateway.fleet.waiting import Queued

RETRY_AFTER_S = 5.0
TIMEOUTS = frozenset({"head_timeout", "first_byte_timeout"})
UNAVAILABLE = frozenset({"unreachable", "connect_timeout", "busy", "full", "disconnected"})
# A body of so many bytes is translated in a few milliseconds, whatever is in it.
SMALL_REQUEST = 16_384
NOT_ASKED = NOT_SENT | {NO_ROUTE}
# Faults of backends that do not work on the call: they were not asked, or have answered.
IDLE = NOT_ASKED | {"busy", "model_gone", "token_refused", "bad_status", "disconnected"}
# Faults after which a backend may have lost what it had loaded.
BROKEN = frozenset({"unreachable", "disconnected", "cut_short", "broken_off", "not_http"})
# Faults that a wrong request may also cause, if the backend reports them in unknown words.
DOUBTFUL = frozenset({"bad_status", "bad_first_frame"})


# Runs work that may block the event loop, in its turn among that of all callers: the caller's name, the work, its scope.
InTurn = Callable[[str, Callable[[], Translation], CancelScope], Awaitable[Translation]]


# The model of a call as the backends have it now, None if none has it.
FindAgain = Callable[[], Model | None]


class Failover:
    """Finds an answer to a call among the backends that have its model."""

    def __init__(
        self,
        backends: Mapping[str, Backend],
        placing: Placing,
        loaded: LoadedModels,
        held: HeldAnswers,
        in_turn: InTurn,
        *,
        most_tokens: int,
    ) -> None:
        self._backends, self.placing, self.loaded, self.held, self.in_turn = backends, placing, loaded, held, in_turn
        self.most_tokens = most_tokens

    def for_call(
        self, call: Call, dialect: Dialect, model: Model, find_again: FindAgain, headers: bytes, caller: Caller
    ) -> "FailoverRun":
        """Decides which backends are tried; sends nothing before `FailoverRun.open`. `headers` are whole lines."""
        candidates = self.candidates(model, call)
        if not candidates and not is_served(model, call):
            raise RouteNotServed
        return FailoverRun(self, model, find_again, candidates, call, dialect, headers, caller)

    def candidates(self, model: Model, call: Call) -> list[Candidate]:
        return choose(model, self._backends, call, time.time())


class FailoverRun:
    """Tries the backends for one call. What was done for it can be read at any time, also after `open` was cancelled."""

    def __init__(
        self,
        failover: Failover,
        model: Model,
        find_again: FindAgain,
        candidates: list[Candidate],
        call: Call,
        dialect: Dialect,
        headers: bytes,
        caller: Caller,
    ) -> None:
        # The candidates that are left, and those that have been tried.
        self._failover, self._model, self._find_again, self._candidates = failover, model, find_again, candidates
        self._tried: set[tuple[str, str]] = set()
        # The client has had the first frames of a translated answer.
        self._has_begun = False
        self._call, self._dialect, self._headers, self._caller = call, dialect, headers, caller
        # How it waited for the slot that it has had first, and the slot that it has had last.
        self.queued: Queued | None = None
        self.on_queued: Callable[[], None] | None = None
        self.waited_s = 0.0
        self.slot: Slot | None = None
        self._claim: Claim | None = None
        # The backends that did not answer, the last fault, and the seconds that all backends took.
        self.attempts: list[Attempt] = []
        self.detail = ""
        self.upstream_s = 0.0
        # Whether a backend may be working on the call, or has answered it.
        self.was_sent = False
        # The backend that works on the call or has answered it, and since when.
        self.slot_backend = ""
        self.slot_from: float | None = None
        # The backend that answered or refused, and its spelling of the model's name.
        self.backend = self.answered_as = ""
        self._faults: list[BackendFault] = []
        self._refused: BackendCannot | None = None
        self._untranslatable: BadRequest | None = None
        # How the call reached the backend that answered, refused it or failed last.
        self.translation: Translation | None = None
        self._doubtful: list[Backend] = []

    async def open(self, cancel_scope: CallScope) -> Opening:
        """The beginning of the first good answer; raises BackendRefused, NoBackend, BackendTimeout or BackendFailed."""
        while (candidate := await self._next()) is not None:
            backend = candidate.backend
            began = time.monotonic()
            try:
                opening = await self._try(candidate, cancel_scope)
            except BackendFault as fault:
                self._add_fault(backend, fault, time.monotonic() - began)
                if fault.reason == NO_ROUTE and self._can_translate(candidate):
                    continue
                if self._has_enough:
                    break
            except BackendCannot as refused:
                self._add_inability(backend, refused, time.monotonic() - began)
            except BackendRefused:
                self.backend = backend.name
                self._doubt()
                raise
            except BadRequest as wrong:
                # It cannot be translated; another backend may have the path itself.
                self._untranslatable = wrong
            else:
                self.backend, self.answered_as = backend.name, candidate.spelling
                # The request was right, so it did not cause the doubtful faults.
                for doubtful in self._doubtful:
                    doubtful.breaker.failed()
                return opening
            finally:
                self.upstream_s += time.monotonic() - began
        self._doubt()
        raise self._refused or self._untranslatable or failure_of(self._faults)

    async def _next(self) -> Candidate | None:
        """The next candidate to try; if calls need a slot there, with a slot."""
        if not self._candidates:
            return None
        if not takes_slot(self._call.operation):
            return self._take_out(self._candidates[0])
        placing, claim = self._failover.placing, self._claim
        if claim is None:
            claim = self._claim = placing.claims.claim(self._call, group_of(self._model), self._caller, self._candidates)
        else:
            claim.places = placing.claims.places(self._call, self._caller, self._candidates)
        found = await placing.slot_for(claim, self._call, self._caller, self._renewed, self._note_queued)
        if found is None:
            return None
        self.slot, candidate = found
        return self._take_out(candidate)

    def _renewed(self) -> list[Candidate]:
        """The candidates that are left as they are now, and those that have come since."""
        model = self._find_again()
        fresh = self._failover.candidates(model, self._call) if model is not None else []
        places = {one.place for one in fresh}
        # Those that are tried once more, with a translation.
        left = [one for one in self._candidates if one.place in self._tried & places]
        new = [one for one in fresh if one.place not in self._tried and (one.translator or not self._has_begun)]
        self._candidates = left + new
        return self._candidates

    def _take_out(self, candidate: Candidate) -> Candidate:
        self._candidates = [other for other in self._candidates if other.place != candidate.place]
        self._tried.add(candidate.place)
        return candidate

    def _note_queued(self, queued: Queued) -> None:
        self.waited_s += queued.waited_s
        if self.queued is None:
            self.queued = queued
            if self.on_queued is not None:
                self.on_queued()

    def early_frames(self) -> bytes:
        """The first frames of the answer, if the client may have them now: whichever backend answers, they are the same."""
        if self.translation is None or not all(candidate.translator for candidate in self._candidates):
            return b""
        self._has_begun = True
        return self.translation.early_frames()

    def _can_translate(self, candidate: Candidate) -> bool:
        """Whether a backend that had the path when it was last looked for is tried once more, with a translation."""
        translator = None if candidate.translator else translators.find(self._call, candidate.backend.kind)
        if translator is None or not self._call.operation.is_optional:
            return False
        self._candidates.insert(0, candidate._replace(translator=translator))
        return True

    @property
    def _has_enough(self) -> bool:
        """If one backend cannot do what the request needs, one other is tried: it may be a different build."""
        others = [fault for fault in self._faults if fault.reason not in NOT_ASKED]
        return self._refused is not None and bool(others)

    def _add_fault(self, backend: Backend, fault: BackendFault, took_s: float) -> None:
        self._faults.append(fault)
        self.was_sent, self.slot_from = False, None
        self.attempts.append(Attempt(backend.name, fault.reason, took_s * 1000, fault.detail))
        self.detail = str(fault)
        if fault.reason in BROKEN:
            self._failover.placing.queue.look(backend.name)
        if fault.reason in DOUBTFUL:
            self._doubtful.append(backend)

    def _add_inability(self, backend: Backend, refused: BackendCannot, took_s: float) -> None:
        """Raises `refused` if it is the second."""
        if self._refused is not None:
            self.backend = backend.name
            self._doubt()
            raise refused
        self._refused = refused
        self._faults.clear()
        self.was_sent, self.slot_from = False, None
        self.attempts.append(Attempt(backend.name, CANNOT, took_s * 1000))

    def _doubt(self) -> None:
        """No backend answered: a fault that the request may have caused counts once for each caller."""
        for backend in self._doubtful:
            backend.breaker.doubted(self._caller.id)

    async def _try(self, candidate: Candidate, cancel_scope: CallScope) -> Opening:
        try:
            opening = await self._call_backend(candidate, cancel_scope)
        except BaseException as wrong:
            if self.slot is not None:
                (self.slot.free if _has_ended(wrong) else self.slot.free_soon)()
            raise
        opening.slot = self.slot
        if self.slot is not None:
            self._failover.placing.queue.opened(self.slot, candidate.offer.size)
        return opening

    async def _call_backend(self, candidate: Candidate, cancel_scope: CallScope) -> Opening:
        backend, spelling, translator = candidate.backend, candidate.spelling, candidate.translator
        if backend.is_full:
            raise BackendFault("full", f"{backend.in_flight} requests in flight")
        call = self._call
        self.translation = None
        if translator is not None:
            self.translation = await self._translate(translator, backend, cancel_scope)
            call = self.translation.call
        runner = self._failover.loaded.runner(call, backend, spelling) if backend.kind == "ollama" else None
        body = call.body_for(backend.kind, spelling, self._failover.most_tokens, runner)
        path, upload = call.operation.path.encode(), call.upload
        backend.take()
        self.was_sent = True
        began = time.monotonic()
        self.slot_backend, self.slot_from = backend.name, began
        upstream: Upstream | None = None
        try:
            if upload is None:
                upstream = await backend.post(path, self._headers, body, cancel_scope)
            else:
                upstream = await backend.upload(path, self._headers, upload, spelling)
            if self.translation is not None:
                upstream = self._translated(upstream, self.translation, backend)
            cancel_scope.within(backend.config.read_timeout_s, _no_first_byte, on_expiry=upstream.fail)
            reservation = Reservation(self._failover.held, self._caller.id)
            opening = await read_beginning(backend, upstream, self._call, self._dialect, reservation)
            opening.translation = self.translation
            backend.breaker.succeeded()
            if runner is not None:
                self._failover.loaded.answered(runner, backend, spelling)
        except BaseException as wrong:
            if isinstance(wrong, BackendFault) and not _is_inconclusive(wrong, backend, began):
                backend.breaker.failed()
            if runner is not None:
                self._failover.loaded.failed(backend, spelling)
            if upstream is not None:
                upstream.close()
            backend.give_back()
            raise
        finally:
            cancel_scope.without_deadline()
        return opening

    async def _translate(self, translator: Translator, backend: Backend, cancel_scope: CallScope) -> Translation:
        work = partial(translator.translate, self._call, backend.kind)
        if self._call.size <= SMALL_REQUEST:
            return work()
        return await self._failover.in_turn(self._caller.id, work, cancel_scope)

    def _translated(self, upstream: BackendResponse, translation: Translation, backend: Backend) -> TranslatedResponse:
        self._call.capped = translation.call.capped
        bounds = backend.unframed, backend.pieces
        return TranslatedResponse(upstream, translation, self._dialect.framing, backend.config, *bounds)


def _has_ended(wrong: BaseException) -> bool:
    """Whether a backend with this failure works no more on the call."""
    if isinstance(wrong, BackendFault):
        return wrong.reason in IDLE
    return isinstance(wrong, BackendRefused | BadRequest) and not isinstance(wrong, AnswerTooLarge)


def _no_first_byte() -> BackendFault:
    return BackendFault("first_byte_timeout")


def _is_inconclusive(fault: BackendFault, backend: Backend, began: float) -> bool:
    """Whether a backend may be healthy despite this fault: if it answered other requests meanwhile, this was just expensive.

    Whether a doubtful fault counts is decided later, when other backends have answered the same request, or failed as well.
    """
    if fault.reason in TIMEOUTS:
        return backend.breaker.has_succeeded_since(began)
    return fault.reason in ("model_gone", NO_ROUTE, "full", *DOUBTFUL) or (
        isinstance(fault, Busy) and fault.detail == "status 429"
    )


def failure_of(faults: Sequence[BackendFault]) -> GatewayError:
    """The error for the caller when every backend failed, with the time after which to try again."""
    waits = [fault.retry_after for fault in faults if isinstance(fault, Busy) and fault.retry_after]
    reasons = {fault.reason for fault in faults if fault.reason != NO_ROUTE}
    if faults and not reasons:
        return RouteNotServed()
    if reasons <= UNAVAILABLE:
        return NoBackend(retry_after=min(waits, default=RETRY_AFTER_S))
    if reasons & TIMEOUTS:
        return BackendTimeout()
    if reasons == {"model_gone"}:
        return NoBackend(retry_after=RETRY_AFTER_S)
    return BackendFailed()
