"""Requests of coding agents, recorded from the agents themselves.

A file in tests/recordings has the requests of one session in their order. Prose of the agents' makers is not in it: `{{72}}`
stands for 72 characters of it. A field of a body that is `{{as in request 1}}` is the same as in that request.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).parents[2] / "recordings"
# It has characters that JSON escapes and such that take several bytes, as the prose has.
FILLER = 'This line stands for "other" words — as many of them, in C:\\docs or in a café. '
LENGTH = re.compile(r"\{\{(\d+)\}\}")
EARLIER = re.compile(r"\{\{as in request (\d+)\}\}")

Body = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """`headers` lacks the key and what describes the connection."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Body | None

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


@dataclass(frozen=True)
class Session:
    name: str
    agent: str
    version: str
    requests: list[Request]

    def of_path(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def turns(self, path: str) -> list[Body]:
        """The bodies that ask for the turns of one conversation: each has more messages than the one before it."""
        return [request.body for request in self.of_path(path) if request.body and len(request.body.get("tools", ())) > 1]


def names() -> list[str]:
    return sorted(file.stem for file in RECORDINGS.glob("*.json"))


def session(name: str) -> Session:
    recorded = json.loads((RECORDINGS / f"{name}.json").read_text())
    bodies: list[Body | None] = []
    for request in recorded["requests"]:
        bodies.append(_whole(request["body"], bodies))
    requests = [
        Request(request["method"], request["path"], request["query"], request["headers"], body)
        for request, body in zip(recorded["requests"], bodies, strict=True)
    ]
    return Session(name, recorded["agent"], recorded["version"], requests)


def filler(length: int) -> str:
    return (FILLER * (length // len(FILLER) + 1))[:length]


def _whole(body: Body | None, earlier: list[Body | None]) -> Body | None:
    if body is None:
        return None
    return {key: _filled(_shared(key, value, earlier)) for key, value in body.items()}


def _shared(key: str, value: Any, earlier: list[Body | None]) -> Any:
    match = EARLIER.fullmatch(value) if isinstance(value, str) else None
    return (earlier[int(match[1])] or {})[key] if match else value


def _filled(value: Any) -> Any:
    if isinstance(value, str):
        return LENGTH.sub(lambda match: filler(int(match[1])), value)
    if isinstance(value, list):
        return [_filled(entry) for entry in value]
    return {key: _filled(entry) for key, entry in value.items()} if isinstance(value, dict) else value
