"""How our names in Redis begin: what runs for a trial beside a gateway, on its Redis, has names of its own."""

import os

VARIABLE = "NEURONETZ_NAMES_IN_REDIS"
PREFIX = os.environ.get(VARIABLE) or "nz"


def named(rest: str) -> str:
    return f"{PREFIX}:{rest}"


# The channel on which is told whose call has ended.
FREED = named("slots")
