"""Who is calling, and may they, now: the key that a request carries and the limits that it counts in."""

import asyncio

from starlette.types import Scope

from gateway.audit import abandoned
from gateway.audit.record import Record
from gateway.auth import key_format
from gateway.auth.authenticator import Authenticator
from gateway.auth.key import ADMIN, Key
from gateway.core.errors import GatewayError, LimitReached, LimitsUnavailable, NotPermitted, StoreUnavailable
from gateway.dialects.tokens import NO_TOKENS, Need
from gateway.limits.admission import Admission, Ticket
from gateway.limits.limiter import Limiter
from gateway.limits.quota import Quota

LOOK_UP_RESERVE = -1
LOOKS = frozenset({"GET", "HEAD"})
NO_DEFAULTS = Quota()


class Access:
    def __init__(self, authenticator: Authenticator, limits: Limiter, defaults: Quota) -> None:
        self._authenticator, self._limits, self._defaults = authenticator, limits, defaults

    async def key_of(self, scope: Scope, record: Record) -> Key:
        presented = key_format.find(scope["headers"], record.key_in_path)
        record.key = await self._authenticator.key_for(presented, record.client)
        return record.key

    async def operator(self, scope: Scope, record: Record) -> Key:
        """The key of who asks the admin API. Looking is no traffic: of the limits it knows those that the key itself has, so
        that the defaults lock nobody out of the dashboard. Raises NotPermitted without the role."""
        key = await self.key_of(scope, record)
        record.is_operator_read = record.method in LOOKS and ADMIN in key.flags
        await self.admit(record, takes_slot=False)
        if ADMIN not in key.flags:
            raise NotPermitted("this needs a key with the role admin: make key NAME=ops ROLE=admin")
        return key

    async def admit(self, record: Record, model: str = "", need: Need = NO_TOKENS, *, takes_slot: bool = True) -> None:
        """Takes a request, its tokens and a slot from the key's limits; raises LimitReached."""
        assert record.key is not None
        record.need = need
        scopes = record.key.scopes(model, NO_DEFAULTS if record.is_operator_read else self._defaults)
        info = abandoned.call_info(scopes, model, need.prompt, record.opening_fields()) if takes_slot else b""
        ticket = Ticket(record.id, scopes, model, need, info)
        try:
            record.admission = await self._limits.admit(ticket)
        except LimitReached as reached:
            record.detail, record.waited_s = reached.limit, reached.waited_s
            if reached.is_local:
                record.admission = Admission(record.id, scopes, model, takes_slot, "admitted", LOOK_UP_RESERVE)
            raise
        except (asyncio.CancelledError, LimitsUnavailable):
            # Redis, unheard, may be about to let in whom nobody waits for any more: the settlement takes it back.
            record.admission = Admission(record.id, scopes, model, takes_slot, "admitted", LOOK_UP_RESERVE)
            raise

    async def count(self, record: Record, why: Exception) -> None:
        """A request that ends with `why` before it was let in counts all the same; raises LimitReached where that is too many.

        What the limits themselves refuse takes nothing.
        """
        was_asked = record.admission is not None or isinstance(why, LimitReached | LimitsUnavailable | StoreUnavailable)
        if record.key is not None and not was_asked:
            try:
                await self.admit(record, takes_slot=False)
            except LimitReached as reached:
                reached.leaves_body = isinstance(why, GatewayError) and why.leaves_body
                raise

    async def visitor(self, scope: Scope, record: Record) -> Key:
        """The key of a request that asks no backend: it counts as a request and takes no slot."""
        key = await self.key_of(scope, record)
        await self.admit(record, takes_slot=False)
        return key
