"""Names of the fields of a request that are dropped, as the audit and a header of the answer list them."""

import re

LONGEST_NAME, MOST_NAMES = 64, 32
NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_.:-]")


def drop(name: str, dropped: list[str]) -> None:
    """Adds a name once. It may come from a client, so it is cut and made printable."""
    if name in dropped or len(dropped) >= MOST_NAMES:
        return
    plain = NOT_IN_NAMES.sub("?", name[:LONGEST_NAME])
    if plain not in dropped:
        dropped.append(plain)
