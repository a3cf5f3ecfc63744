"""What llama.cpp's servers report of themselves: their slots and, as a router, which models are loaded."""

import asyncio
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from gateway.core import strict_json
from gateway.dialects.model_entries import context_of, has_name, whole_number
from gateway.dialects.model_names import canonical
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.config import MOST_SLOTS
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.routes import DEADLINE_S, UNKNOWN
from gateway.fleet.slots import ANY_MODEL

PATH = "/props"
HEADERS = {"Accept": "application/json"}
# It contains the chat template.
LONGEST_PROPS = 2 * 2**20
# What `--parallel` is by default in every version with a router.
SLOTS_OF_ROUTED = 4
PARALLEL = ("--parallel", "-np")
# A model that sleeps takes no memory, and is loaded again by the next call.
LOADED, LOADING, SLEEPING = "loaded", "loading", "sleeping"
STATES = ("downloading", "downloaded", "unloaded", LOADING, LOADED, SLEEPING)


class RoutedModel(NamedTuple):
    """A model of a router: `size` in bytes and `context` in tokens, which are 0 unless it is loaded; `state` is of STATES."""

    is_loaded: bool
    slots: int
    size: int
    context: int
    state: str = ""


def read_router(answer: object) -> dict[str, RoutedModel]:
    """The models of a router by canonical name, from its `/v1/models`; none if the server is no router."""
    data = answer.get("data") if isinstance(answer, dict) else None
    entries = [entry for entry in data if has_name(entry, "id")] if isinstance(data, list) else []
    return {canonical(entry["id"]).canonical: routed for entry in entries if (routed := _routed(entry))}


def _routed(entry: Mapping[str, Any]) -> RoutedModel | None:
    status, meta = entry.get("status"), entry.get("meta")
    if not isinstance(status, dict) or status.get("value") not in STATES:
        return None
    size = whole_number(meta.get("size")) if isinstance(meta, dict) else 0
    context = context_of({**entry, "meta": meta if isinstance(meta, dict) else {}})
    return RoutedModel(status["value"] == LOADED, _parallel(status.get("args")), size, context, status["value"])


def _parallel(arguments: object) -> int:
    """How many calls the process of a model answers at once, by its command line."""
    words: Sequence[object] = arguments if isinstance(arguments, list) else ()
    for name, value in pairwise(words):
        if name in PARALLEL and isinstance(value, str) and value.isdecimal() and len(value) < 6 and int(value):
            return min(int(value), MOST_SLOTS)
    return SLOTS_OF_ROUTED


async def slots(backend: Backend, known: Mapping[str, int]) -> Mapping[str, int]:
    """How many calls a server without a router answers at once, with any model; what was known if it does not answer now.

    Other servers have no such path, or something else there.
    """
    try:
        async with asyncio.timeout(DEADLINE_S), backend.send("GET", PATH, HEADERS, wait_s=DEADLINE_S) as upstream:
            if upstream.status != 200:
                return known if upstream.status in UNKNOWN else {}
            props = strict_json.read_loosely(await upstream.read_whole(LONGEST_PROPS))
    except (BackendFault, TimeoutError):
        return known
    except ValueError:
        return {}
    total = whole_number(props.get("total_slots")) if isinstance(props, dict) else 0
    return {ANY_MODEL: min(total, MOST_SLOTS)} if total else {}
