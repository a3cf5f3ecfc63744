"""The names of all that the gateway keeps in Redis, and the channels on which its processes notify each other.

The counters, calls in progress and audit rows of a key have one hash tag, its shard. So a script finds all that it touches
on one node of a cluster, and the shards are spread over the nodes (Redis cluster specification, "Hash tags"). A single
server holds the same names, all of them.
"""

import os
import re
import secrets
import time
import zlib
from functools import lru_cache
from typing import NamedTuple

# A drill that runs beside a gateway, on the same Redis, has a prefix of its own.
PREFIX_VARIABLE = "NEURONETZ_NAMES_IN_REDIS"
PREFIX = os.environ.get(PREFIX_VARIABLE) or "nz"
# The start time, in seconds since 1970, follows. A Redis user who may use `nz:*` may use these names.
DRILL_PREFIX = "nz:drill-"


def new_drill_prefix() -> str:
    return f"{DRILL_PREFIX}{time.time():.0f}-{secrets.token_hex(4)}"


def drill_age_s(name: str) -> float:
    """Seconds since the start of the drill that this name belongs to; 0 if it belongs to none."""
    found = re.match(rf"{DRILL_PREFIX}(\d+)-", name)
    return time.time() - int(found[1]) if found else 0.0


def prefixed(name: str) -> str:
    return f"{PREFIX}:{name}"


# Channels. A message on SLOT_FREED is the name of the queue in which a call may now start.
SLOT_FREED = prefixed("slots")
KEYS_CHANGED = prefixed("keys:changed")
DRAINS_CHANGED = prefixed("drains:changed")
MODELS_CHANGED = prefixed("map:changed")
CONTROL = prefixed("control")

# What has no shard.
AUDIT_WRITER = prefixed("audit:writer")
MODELS = prefixed("map")
# Written to find out whether Redis accepts writes.
CHECK, DOCTOR_CHECK, DRILL_CHECK = prefixed("check"), prefixed("doctor"), prefixed("begun")


def verified_key(secret_id: str) -> str:
    """What a process has found out about a key, for the others."""
    return prefixed(f"key:{{{secret_id}}}")


def key_version(secret_id: str) -> str:
    """Counts the changes of a key, so that what was read before a change is not cached after it."""
    return prefixed(f"keyversion:{{{secret_id}}}")


def refused_key(digest: str) -> str:
    return prefixed(f"nokey:{digest}")


def wrong_keys(address: str) -> str:
    return prefixed(f"authfail:{address}")


def control(call: str, part: str) -> str:
    return prefixed(f"control:{call}:{part}")


# One hash tag for all: a cluster returns the lists of all backends in one call.
def model_list(backend: str, place: str) -> str:
    return prefixed(f"{{models}}:{backend}:{place}")


def poll_turn(place: str, every_s: float) -> str:
    return prefixed(f"{{models}}:turn:{place}:{every_s:g}")


SHARDS = 16
# The shard of what belongs to no key.
HOME = 0


class ShardKeys(NamedTuple):
    """The names in a shard that do not depend on a caller's key.

    Hashes: calls in progress, mean answer length by model. Sorted set: leases. Streams: audit rows, prompts. Counter: rows
    dropped because the stream was full.
    """

    calls: bytes
    leases: bytes
    means: bytes
    rows: bytes
    prompts: bytes
    dropped: bytes


def _tagged(shard: int, name: str) -> bytes:
    return prefixed(f"{{{shard}}}:{name}").encode()


def fleet_box(backend: str) -> bytes:
    """A hash: what is known of a backend's memory, and which model it loads now."""
    return _tagged(HOME, f"fleet:box:{backend}")


def fleet_turn(place: str, every_s: float) -> bytes:
    """Set while a process has the turn to ask a backend what it has loaded."""
    return _tagged(HOME, f"fleet:turn:{place}:{every_s:g}")


PROCESSES = _tagged(HOME, "processes")
PROCESS_STATES = _tagged(HOME, "bulletin")
# A hash of what calls cost by backend and model.
COSTS = _tagged(HOME, "fleet:costs")
BY_SHARD = tuple(ShardKeys(*(_tagged(shard, name) for name in ShardKeys._fields)) for shard in range(SHARDS))


# What all processes know of the backends, and who waits for them.
FLEET = _tagged(HOME, "fleet").decode()
# Makes the names of conversations meaningless elsewhere.
FLEET_SALT = f"{FLEET}:salt"


def granted(process: str) -> str:
    """The channel on which a process learns which of its waiting calls have got a slot."""
    return f"{FLEET}:granted:{process}"


@lru_cache(maxsize=20_000)
def shard_of(name: str) -> int:
    """`name` is the id of a key, or of one of its counter sets."""
    return zlib.crc32(name.partition("|")[0].encode()) % SHARDS


@lru_cache(maxsize=20_000)
def counters(counter_set: str) -> tuple[bytes, ...]:
    """The names of a counter set's requests, tokens, reserve, slots, queue, budget of tokens and budget of seconds."""
    shard = shard_of(counter_set)
    return tuple(_tagged(shard, f"{kind}:{counter_set}") for kind in "wtvcqbs")


def slots(counter_set: str) -> bytes:
    return counters(counter_set)[3]


def queue(counter_set: str) -> bytes:
    return counters(counter_set)[4]


def budget(counter_set: str) -> bytes:
    return counters(counter_set)[5]


def seconds(counter_set: str) -> bytes:
    return counters(counter_set)[6]


def once(shard: int, call: str) -> bytes:
    """Set when a call that Redis did not admit has been counted."""
    return _tagged(shard, f"once:{call}")
