"""The pipelined connection to Redis."""

import asyncio

import hiredis

from gateway.stores.redis_connection import Replies


def test_invalid_data_from_redis_ends_the_connection() -> None:
    async def run() -> BaseException | None:
        replies = Replies(lambda _: None)
        replies.connection_lost(hiredis.ProtocolError("nonsense"))
        return replies.ended.exception()

    assert isinstance(asyncio.run(run()), ConnectionError)
