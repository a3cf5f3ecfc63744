"""The prompt log of one request: its text and its answer, for keys that keep them; bounded, and never in logs."""

import re
from collections.abc import Callable
from typing import Any

from gateway.core import strict_json
from gateway.dialects.large_json import LARGEST_READ_WHOLE

LONGEST_TEXT = 64 * 1024
LONGEST_RAW = 1024 * 1024
LONGEST_WORD = 1000
MOST_DEPTH = 200
ENDLESS = re.compile(r"[!-~]*")


class PromptLog:
    """Collects the bytes of the answer; `entry` makes text of them when the request has ended."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_cut = False

    def add(self, piece: bytes) -> None:
        if self._size + len(piece) > LONGEST_RAW or len(piece) > LARGEST_READ_WHOLE:
            self._is_cut = True
        else:
            self._pieces.append(piece)
            self._size += len(piece)

    def entry(self, text_of: Callable[[bytes], str]) -> dict[str, Any]:
        request = strict_json.write_with_replacements(without_blobs(self._body)).decode("utf-8", "replace")
        answer = text_of(b"".join(self._pieces))
        is_cut = self._is_cut or len(request) > LONGEST_TEXT or len(answer) > LONGEST_TEXT
        return {"request": request[:LONGEST_TEXT], "answer": answer[:LONGEST_TEXT], "is_cut": is_cut}


def without_blobs(value: Any, depth: int = 0) -> Any:
    """The value without images, other very long words and what is nested too deeply to be written."""
    if isinstance(value, dict | list) and depth >= MOST_DEPTH:
        return "(left out, as it is nested too deeply)"
    if isinstance(value, dict):
        return {name: without_blobs(inner, depth + 1) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_blobs(inner, depth + 1) for inner in value]
    if isinstance(value, str) and len(value) > LONGEST_WORD and ENDLESS.fullmatch(value):
        return f"({len(value)} characters left out)"
    return value
