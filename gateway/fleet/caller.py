"""Who a call is from, as far as the order of the queue depends on it."""

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.fleet.waiting import KeySlot


class NoKeySlot:
    """Of a call that holds no slot of its key."""

    def give_up(self) -> None:
        return

    async def take_again(self) -> bool:
        return True

    async def wait_for_one(self, longest_s: float) -> None:
        return


NO_KEY_SLOT: KeySlot = NoKeySlot()


@dataclass(slots=True)
class Caller:
    """`id` is that of the key, `call` that of the request; `sub_user` is one of the people who share the key."""

    id: str
    call: str = ""
    weight: float = 1.0
    sub_user: str = ""
    is_batch: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()
    key_slot: KeySlot = NO_KEY_SLOT
