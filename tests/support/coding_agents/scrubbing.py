"""Makes a recording of the raw requests of a coding agent: nothing of a machine or a person, and no prose of the makers."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support.coding_agents.recordings import RECORDINGS

# Texts of this length or less are the test's own: its task, its tools' results.
OWN = 120
CONNECTION = frozenset({"authorization", "x-api-key", "connection", "host", "content-length"})
TAG = re.compile(r"\s*</?[a-z_ -]+>\s*")
BILLING = re.compile(r"x-anthropic-billing-header:.*")
PROSE_KEYS = frozenset({"description", "definition", "text", "content"})
IDS = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\b[0-9a-f]{64}\b|\ba[0-9a-f]{16}\b")
REPLACED = (
    (re.compile(r"(?<=Chunk ID: )[0-9a-f]+"), "000000"),
    (re.compile(r'(?<="turn_started_at_unix_ms":)\d+'), "1700000000000"),
    (re.compile(r"\((?:Debian|Ubuntu|Linux|Mac OS)[^;)]*;"), "(Linux;"),
)


class Scrubber:
    """`folders` are names of folders of the recorded machine and what to call them."""

    def __init__(self, folders: dict[str, str]) -> None:
        self._folders, self._ids = folders, dict[str, str]()

    def recording(self, agent: str, version: str, raw: Iterable[dict[str, Any]]) -> dict[str, Any]:
        bodies: list[Any] = []
        requests = [self._request(request, bodies) for request in raw]
        return {"agent": agent, "version": version, "requests": requests}

    def _request(self, raw: dict[str, Any], bodies: list[Any]) -> dict[str, Any]:
        path, _, query = raw["path"].partition("?")
        headers = {name: self._neutral(value) for name, value in raw["headers"] if name.lower() not in CONNECTION}
        bodies.append(None if raw["body"] is None else self._body(raw["body"]))
        body = {key: _reference(key, value, bodies[:-1]) for key, value in (bodies[-1] or {}).items()} or None
        return {"method": raw["method"], "path": path, "query": query, "headers": headers, "body": body}

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        return {key: self._scrubbed(value, key, key in ("system", "tools", "instructions")) for key, value in body.items()}

    def _scrubbed(self, value: Any, key: str, theirs: bool) -> Any:
        """`theirs` says that even a short text is the makers'."""
        if isinstance(value, dict):
            theirs = theirs or value.get("role") in ("system", "developer")
            return {name: self._scrubbed(entry, name, theirs) for name, entry in value.items()}
        if isinstance(value, list):
            return [self._scrubbed(entry, key, theirs) for entry in value]
        if not isinstance(value, str):
            return value
        is_prose = key in PROSE_KEYS and (theirs or len(value) > OWN) and not BILLING.match(value)
        return _without_prose(value) if is_prose else self._neutral(value)

    def _neutral(self, text: str) -> str:
        for folder, name in self._folders.items():
            text = text.replace(folder, name)
        for pattern, neutral in REPLACED:
            text = pattern.sub(neutral, text)
        return IDS.sub(lambda match: self._id(match[0]), text)

    def _id(self, found: str) -> str:
        if found not in self._ids:
            digits = iter(f"{len(self._ids) + 1:0{sum(char != '-' for char in found)}d}")
            self._ids[found] = "".join("-" if char == "-" else next(digits) for char in found)
        return self._ids[found]


def _without_prose(text: str) -> str:
    return "\n".join(line if not line or TAG.fullmatch(line) else f"{{{{{len(line)}}}}}" for line in text.split("\n"))


def _reference(key: str, value: Any, earlier: list[Any]) -> Any:
    same = (number for number, body in enumerate(earlier) if body and json.dumps(body.get(key)) == json.dumps(value))
    number = next(same, None)
    return value if number is None or len(json.dumps(value)) < OWN else f"{{{{as in request {number}}}}}"


def write(name: str, recording: dict[str, Any]) -> Path:
    file = RECORDINGS / f"{name}.json"
    file.write_text(json.dumps(recording, indent=1, ensure_ascii=False) + "\n")
    return file
