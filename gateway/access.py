"""Who is calling: the key that a request carries."""

from starlette.types import Scope

from gateway import api_key
from gateway.authentication import Authenticator
from gateway.keys import Key
from gateway.record import Record


class Access:
    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def key_of(self, scope: Scope, record: Record) -> Key:
        presented = api_key.find(scope["headers"], record.key_in_path)
        key = await self._authenticator.key_for(presented, record.client)
        record.key_id = key.id
        return key
