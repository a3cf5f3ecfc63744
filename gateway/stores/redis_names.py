"""How our names in Redis begin: what runs for a trial beside a gateway, on its Redis, has names of its own."""

import os
import re
import secrets
import time

VARIABLE = "NEURONETZ_NAMES_IN_REDIS"
PREFIX = os.environ.get(VARIABLE) or "nz"


def named(rest: str) -> str:
    return f"{PREFIX}:{rest}"


# How the names of a trial begin, before the time of its beginning in seconds since 1970. Who may use `nz:*` may use these.
TRIAL = "nz:drill-"


def of_a_new_trial() -> str:
    return f"{TRIAL}{time.time():.0f}-{secrets.token_hex(4)}"


def age_of_trial(name: str) -> float:
    """Seconds since the trial began that gave this name; 0 where none did."""
    found = re.match(rf"{TRIAL}(\d+)-", name)
    return time.time() - int(found[1]) if found else 0.0


# The channel on which is told whose call has ended.
FREED = named("slots")
