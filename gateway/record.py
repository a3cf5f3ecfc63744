"""What became of one request: filled in as it goes, written as one log line at its end."""

import time
from dataclasses import dataclass, field
from typing import Any

from gateway.dialects.base import Usage


@dataclass
class Attempt:
    backend: str
    fault: str
    ms: float


@dataclass
class Record:
    """Times are seconds of the monotonic clock; `route` is a line of the route table, never the path as it was sent."""

    request_id: str
    method: str
    client: str = ""
    began: float = field(default_factory=time.monotonic)
    key_in_path: str | None = field(default=None, repr=False)
    dialect: str = ""
    route: str = "unmatched"
    key_id: str = ""
    model: str = ""
    stream: bool = False
    backend: str = ""
    show_backend: bool = False
    attempts: list[Attempt] = field(default_factory=list)
    status: int = 0
    outcome: str = ""
    detail: str = ""
    usage: Usage = field(default_factory=Usage)
    bytes_in: int = 0
    bytes_out: int = 0
    first_byte_at: float | None = None

    def line(self) -> dict[str, Any]:
        now = time.monotonic()
        return {
            "request_id": self.request_id,
            "key": self.key_id,
            "client": self.client,
            "dialect": self.dialect,
            "method": self.method,
            "route": self.route,
            "model": self.model,
            "backend": self.backend,
            "attempts": [f"{attempt.backend}: {attempt.fault}" for attempt in self.attempts],
            "status": self.status,
            "outcome": self.outcome,
            "detail": self.detail,
            "prompt_tokens": self.usage.prompt_tokens,
            "completion_tokens": self.usage.completion_tokens,
            "ttfb_ms": None if self.first_byte_at is None else round((self.first_byte_at - self.began) * 1000, 1),
            "total_ms": round((now - self.began) * 1000, 1),
        }
