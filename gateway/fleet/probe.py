"""Tries a backend: whether it answers, how fast, with what, in which dialects, and whether it accepts the token."""

import asyncio
from collections.abc import Mapping
from typing import Any

from gateway.fleet import routes
from gateway.fleet.backends.backend import Backend
from gateway.fleet.backends.http_client import BackendFault
from gateway.fleet.discovery import poll, slots_reported, takes_token
from gateway.fleet.slots import ANY_MODEL
from gateway.fleet.ways import speaks

SEEN = ("latency_ms", "version", "models", "speaks", "slots")


async def probe_all(backends: Mapping[str, Backend]) -> list[dict[str, Any]]:
    """Probes all at the same time; the results are in their order."""
    return list(await asyncio.gather(*(probe(backend) for backend in backends.values())))


async def probe(backend: Backend) -> dict[str, Any]:
    facts: dict[str, Any] = {"backend": backend.name, "kind": backend.kind, "address": backend.config.base_url}
    has_token = bool(backend.config.auth_token)
    try:
        found = await poll(backend)
        is_open = await takes_token(backend)
        dialects = speaks(backend.kind, (await routes.find(backend, found))[0]) if is_open else None
        slots = await slots_reported(backend, found)
    except BackendFault as fault:
        refused = fault.reason == "token_refused"
        verdict = {"token": _token_words(has_token, is_open=False) if refused else None, "problem": str(fault)}
        return {**facts, "reachable": refused, **dict.fromkeys(SEEN), **verdict}
    seen = {"latency_ms": found.latency_ms, "version": found.version or None, "models": len(found.models), "speaks": dialects}
    # Those of a router depend on the model.
    seen["slots"] = slots.get(ANY_MODEL)
    problem = None if is_open else "refuses to answer calls"
    return {**facts, "reachable": True, **seen, "token": _token_words(has_token, is_open=is_open), "problem": problem}


def _token_words(has_token: bool, *, is_open: bool) -> str:
    if has_token:
        return "accepted" if is_open else "REFUSED"
    return "none needed" if is_open else "MISSING"
