"""Where in Redis the state of a key is: its counters, running calls and rows have names of one hash tag.

So a script finds all that it touches on one node of a cluster, where the tags are spread over the nodes (Redis cluster
specification, "Hash tags"). A server of its own holds the same names, all of them.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple

from gateway.stores.redis_names import named

SHARDS = 16
# What all share lies with the first of them.
HOME = 0


class Shared(NamedTuple):
    """What the keys of one shard share."""

    calls: bytes
    leases: bytes
    means: bytes
    rows: bytes
    prompts: bytes
    dropped: bytes


def _tagged(shard: int, name: str) -> bytes:
    return named(f"{{{shard}}}:{name}").encode()


PROCESSES = _tagged(HOME, "processes")
BULLETIN = _tagged(HOME, "bulletin")
ALL = tuple(Shared(*(_tagged(shard, name) for name in Shared._fields)) for shard in range(SHARDS))


@lru_cache(maxsize=20_000)
def shard_of(name: str) -> int:
    """Of a key's id or of one of its scopes."""
    return zlib.crc32(name.partition("|")[0].encode()) % SHARDS


@lru_cache(maxsize=20_000)
def counters(scope: str) -> tuple[bytes, ...]:
    """A scope's requests, tokens, reserve, slots, queue and budget."""
    shard = shard_of(scope)
    return tuple(_tagged(shard, f"{kind}:{scope}") for kind in "wtvcqb")


def slots(scope: str) -> bytes:
    return counters(scope)[3]


def queue(scope: str) -> bytes:
    return counters(scope)[4]


def budget(scope: str) -> bytes:
    return counters(scope)[5]


def once(shard: int, call: str) -> bytes:
    return _tagged(shard, f"once:{call}")
