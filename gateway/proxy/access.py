"""The key that a request carries, and admission by the limits of that key."""

import asyncio

from starlette.types import Scope

from gateway.audit import abandoned
from gateway.audit.record import Record
from gateway.auth import key_format
from gateway.auth.authenticator import Authenticator
from gateway.auth.key import ADMIN, Key
from gateway.core.errors import GatewayError, LimitReached, LimitsUnavailable, NotPermitted, StoreUnavailable
from gateway.dialects.tokens import NO_TOKENS, Need
from gateway.limits.admission import RESERVE_UNKNOWN, Admission, Ticket
from gateway.limits.limiter import Limiter
from gateway.limits.quota import Quota

READS = frozenset({"GET", "HEAD"})
NO_DEFAULTS = Quota()


class Access:
    def __init__(self, authenticator: Authenticator, limits: Limiter, defaults: Quota) -> None:
        self._authenticator, self._limits, self._defaults = authenticator, limits, defaults

    async def key_of(self, scope: Scope, record: Record) -> Key:
        presented = key_format.find(scope["headers"], record.key_in_path)
        record.key = await self._authenticator.key_for(presented, record.client)
        return record.key

    async def admit_operator(self, scope: Scope, record: Record) -> Key:
        """The key of a request to the admin API; raises NotPermitted without the role.

        Reading is not traffic: only the key's own limits apply, so that the defaults lock nobody out of the dashboard.
        """
        key = await self.key_of(scope, record)
        record.is_operator_read = record.method in READS and ADMIN in key.flags
        await self.admit(record, takes_slot=False)
        if ADMIN not in key.flags:
            raise NotPermitted("this needs a key with the role admin: make key NAME=ops ROLE=admin")
        return key

    async def admit(self, record: Record, model: str = "", need: Need = NO_TOKENS, *, takes_slot: bool = True) -> None:
        """Takes a request, its tokens and a slot from the key's limits; raises LimitReached."""
        assert record.key is not None
        record.need = need
        counter_sets = record.key.counter_sets(model, NO_DEFAULTS if record.is_operator_read else self._defaults)
        # Callers make up names that match the glob of an alias: only the glob's own has a mean.
        model = record.canonical if model else ""
        info, seconds_ms = b"", 0
        if takes_slot:
            seconds_ms = self._limits.estimates.ms_to_reserve(counter_sets, model)
            info = abandoned.call_info(counter_sets, model, need.prompt, record.opening_fields(), seconds_ms)
        ticket = Ticket(record.id, counter_sets, model, need, info, seconds_ms)
        try:
            record.admission = await self._limits.admit(ticket)
        except LimitReached as reached:
            record.detail, record.waited_s = reached.limit, reached.waited_s
            if reached.is_local:
                record.admission = _admitted_perhaps(ticket)
            raise
        except (asyncio.CancelledError, LimitsUnavailable):
            # Redis may still admit this call, though its caller no longer waits: the settlement reverses that.
            record.admission = _admitted_perhaps(ticket)
            raise

    async def charge(self, record: Record, error: Exception) -> None:
        """Counts a request that ended with `error` before it was admitted; raises LimitReached where that is one too many.

        A request that the limits themselves refused is not counted.
        """
        is_counted = record.admission is not None or isinstance(error, LimitReached | LimitsUnavailable | StoreUnavailable)
        if record.key is not None and not is_counted:
            try:
                await self.admit(record, takes_slot=False)
            except LimitReached as reached:
                reached.leaves_body = isinstance(error, GatewayError) and error.leaves_body
                raise

    async def admit_caller(self, scope: Scope, record: Record) -> Key:
        """The key of a request that needs no backend: it counts as a request and takes no slot."""
        key = await self.key_of(scope, record)
        await self.admit(record, takes_slot=False)
        return key


def _admitted_perhaps(ticket: Ticket) -> Admission:
    names = (ticket.id, ticket.counter_sets, ticket.model, bool(ticket.info), "admitted", RESERVE_UNKNOWN)
    return Admission(*names, seconds_ms=ticket.seconds_ms)
