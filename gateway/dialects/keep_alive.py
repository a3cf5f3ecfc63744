"""How long a model stays loaded (`keep_alive`), as Ollama takes it: a number of seconds, or Go's notation such as `1h30m`."""

import math
import re

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)"
NOTATION = re.compile(rf"([+-]?)((?:{PART})+|0)", re.ASCII)
PARTS = re.compile(PART, re.ASCII)
LONGEST_TEXT = 64
# Go keeps durations as nanoseconds in 64 bits.
LONGEST_S = 2**63 / 1e9


def keep_alive_s(value: object) -> float | None:
    """Its seconds; infinity for a negative one, which Ollama takes for "forever"; None if Ollama would refuse it."""
    if isinstance(value, str):
        return _written(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LONGEST_S < value < LONGEST_S:
        return None
    return math.inf if value < 0 else float(value)


def _written(text: str) -> float | None:
    found = NOTATION.fullmatch(text) if len(text) <= LONGEST_TEXT else None
    if found is None:
        return None
    total = sum(float(number) * UNITS[unit] for number, unit in PARTS.findall(found[2]))
    if total >= LONGEST_S:
        return None
    return math.inf if found[1] == "-" and total else total
