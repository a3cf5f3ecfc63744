"""Who a request is from, as the queue of the fleet knows it: its key, one of the key's users, its class."""

import hashlib
from collections.abc import Sequence

from gateway.audit.record import Record
from gateway.auth.key import BATCH, SUB_USERS
from gateway.core.errors import BadRequest
from gateway.fleet.caller import NO_KEY_SLOT, Caller
from gateway.limits.limiter import Limiter

CLASS_HEADER, CLASSES = b"x-gateway-class", (b"interactive", b"batch")
SUB_USER_BYTES = 8


class Callers:
    """`sub_user_header` is in lower case; it counts only in requests with a key that has several users."""

    def __init__(self, limits: Limiter, sub_user_header: bytes) -> None:
        self._limits, self._sub_user_header = limits, sub_user_header

    def of(self, headers: Sequence[tuple[bytes, bytes]], record: Record) -> Caller:
        """Raises BadRequest for a class that there is not."""
        key, admission = record.key, record.admission
        assert key is not None
        key_slot = NO_KEY_SLOT if admission is None else self._limits.key_slot(admission)
        caller = Caller(key.id, record.id, key.weight, headers=headers, key_slot=key_slot)
        caller.is_batch = BATCH in key.flags
        for name, value in headers:
            if name == CLASS_HEADER:
                if value not in CLASSES:
                    raise BadRequest("the header X-Gateway-Class must be 'interactive' or 'batch'")
                # A request can only yield more than its key does, never less.
                caller.is_batch = caller.is_batch or value == b"batch"
            elif name == self._sub_user_header and value and SUB_USERS in key.flags:
                caller.sub_user = hashlib.blake2b(value, digest_size=SUB_USER_BYTES).hexdigest()
        return caller
