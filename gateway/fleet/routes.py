"""Which optional paths a backend has, found out without generating anything."""

import asyncio
import time
from dataclasses import replace

from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.catalog import Snapshot
from gateway.fleet.ways import OPERATIONS

# Every server refuses a body that is no object. A broken one could be refused before the path is considered; and from an
# object without fields some servers would generate with their defaults.
PROBE = b"[]"
HEADERS = {"Content-Type": "application/json", "Accept": "application/json"}
DEADLINE_S = 3.0
FRESH_S = 600.0
# Servers whose streams on a path official clients cannot read: the events have neither numbers nor indexes.
POOR = {"/v1/responses": "llama.cpp"}
# LM Studio answers any unknown path with 200.
ABSENT = frozenset({200, 404, 405, 501})
# Statuses that say nothing about the path: the token is wrong, or the server is busy or starts.
UNKNOWN = frozenset({401, 403, 408, 429, 502, 503, 504})
# Paths that no kind of backend always has.
OPTIONAL = tuple(path for path, operation in OPERATIONS.items() if operation.is_optional and not operation.kinds)


def with_known(fresh: Snapshot, known: Snapshot) -> Snapshot:
    """A new snapshot with the paths and slots that are known, unless they may have changed: then its `routes_at` is 0."""
    is_same = bool(known.routes_at) and not known.error and known.version == fresh.version
    is_fresh = is_same and time.time() - known.routes_at < FRESH_S
    # A router reports its slots in each list of models.
    slots = fresh.slots if fresh.swaps or known.swaps else known.slots
    return replace(fresh, routes=known.routes, routes_at=known.routes_at if is_fresh else 0.0, slots=slots)


async def find(backend: Backend, known: Snapshot) -> tuple[tuple[str, ...], float]:
    """Asks for each path. Where the answer shows nothing, what was known stays, and the next poll asks again.

    Returns the paths and the `routes_at` of them.
    """
    found = await asyncio.gather(*(has_path(backend, path) for path in OPTIONAL))
    routes = [path for path, has in zip(OPTIONAL, found, strict=True) if has or (has is None and path in known.routes)]
    return tuple(routes), 0.0 if None in found else time.time()


async def has_path(backend: Backend, path: str) -> bool | None:
    """Whether the backend has the path; None if the answer does not show it."""
    try:
        async with backend.send("POST", path, HEADERS, PROBE, wait_s=DEADLINE_S) as upstream:
            if path in POOR and POOR[path] in upstream.headers.get("Server", ""):
                return False
            return verdict(upstream.status, upstream.headers.get("Content-Type", ""))
    except BackendFault:
        return None


def verdict(status: int, content_type: str) -> bool | None:
    """Whether an answer shows that the path is there. llama.cpp answers 500 with JSON where a field is missing."""
    if status in UNKNOWN:
        return None
    is_json = content_type.lower().partition(";")[0].strip() == "application/json"
    return status >= 400 and status not in ABSENT and is_json
