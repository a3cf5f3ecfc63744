"""The record of one request: filled in while it runs, then written as one log line and one row of the audit."""

import time
from dataclasses import dataclass, field
from typing import Any

from gateway.audit.prompt_log import PromptLog
from gateway.auth.key import Key
from gateway.core import strict_json
from gateway.dialects.dialect import Usage
from gateway.dialects.tokens import NO_TOKENS, Need
from gateway.fleet.attempt import Attempt
from gateway.limits.admission import Admission

NOTHING_COUNTED = Usage()


@dataclass(slots=True)
class Record:
    """Times are in seconds of the monotonic clock, `at` in microseconds since the epoch. `route` is a pattern of the route
    table, never the path that was sent. `id` is the gateway's and unique; `request_id` may be the caller's. `model` is the
    name that was asked for, `canonical` its canonical name, or the glob of aliases that it matches, if the key may use it.
    """

    id: str
    request_id: str
    method: str
    client: str = ""
    agent: str = ""
    at: int = field(default_factory=lambda: time.time_ns() // 1000)
    began: float = field(default_factory=time.monotonic)
    key_in_path: str | None = field(default=None, repr=False)
    dialect: str = ""
    route: str = "unmatched"
    key: Key | None = None
    model: str = ""
    canonical: str = ""
    answered_as: str = ""
    stream: bool = False
    need: Need = NO_TOKENS
    waited_s: float = 0.0
    admission: Admission | None = None
    backend: str = ""
    show_backend: bool = False
    show_overhead: bool = False
    with_cors: bool = False
    was_sent: bool = False
    # The path at the backend, "" if bytes are passed through; and fields of the request that the backend did not get.
    translated_to: str = ""
    dropped: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    status: int = 0
    outcome: str = ""
    detail: str = ""
    usage: Usage = NOTHING_COUNTED
    relayed_tokens: int = 0
    spent_prompt: int = 0
    spent_completion: int = 0
    spent_cached: int = 0
    prompt_log: PromptLog | None = field(default=None, repr=False)
    bytes_in: int = 0
    bytes_out: int = 0
    first_byte_at: float | None = None
    reading_s: float = 0.0
    upstream_s: float = 0.0
    # Why its backend was chosen; the seconds to the first byte that were estimated when it arrived; its place in the queue.
    chosen_because: str = ""
    estimated_s: float | None = None
    queue_position: int = 0
    # How long it waited for a slot of a backend, which is a part of the time in all queues.
    fleet_wait_s: float = 0.0
    # The backend that worked on the call last; when its slot was granted, and for how long it was held.
    slot_backend: str = ""
    slot_from: float | None = None
    slot_s: float = 0.0
    # The seconds of backends, and where they come from; whether the call caused a load, None if only its report can show it.
    backend_s: float | None = None
    seconds_from: str = "none"
    loaded: bool | None = None
    # Tokens of the prompt that its backend probably had in its cache.
    expected_cached: int = 0
    # An operator's reading in the admin API is not traffic: neither counted nor kept.
    is_operator_read: bool = False
    is_closed: bool = False
    ended_row: dict[str, Any] | None = field(default=None, repr=False)
    row_json: bytes = field(default=b"", repr=False)

    @property
    def key_id(self) -> str:
        return self.key.id if self.key else ""

    @property
    def queue_ms(self) -> float:
        return (self.admission.queue_s if self.admission else self.waited_s) * 1000

    @property
    def overhead_s(self) -> float:
        """What the gateway added to the time to the first byte, without reading the body, queueing and the backends."""
        until = time.monotonic() if self.first_byte_at is None else self.first_byte_at
        return max(0.0, until - self.began - self.reading_s - self.queue_ms / 1000 - self.upstream_s)

    def end_slot(self) -> None:
        """The backend is free for others."""
        if self.slot_from is not None and not self.slot_s:
            self.slot_s = time.monotonic() - self.slot_from

    def opening_fields(self) -> dict[str, Any]:
        """The fields of the row that are known at admission; `abandoned` adds the others if the request never ends."""
        return {
            "id": self.id,
            "at": self.at,
            "request_id": self.request_id,
            "key_id": self.key_id,
            "client": self.client,
            "agent": self.agent,
            "dialect": self.dialect,
            "method": self.method,
            "route": self.route,
            "model": self.model,
            "stream": self.stream,
            "bytes_in": self.bytes_in,
        }

    def end(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        tokens_from: str,
        cached_tokens: int | None = None,
        billed_tokens: int | None = None,
    ) -> bytes:
        """The row of the audit as JSON, which is the log line, too."""
        self.ended_row = self._built(prompt_tokens, completion_tokens, tokens_from)
        self.ended_row["cached_tokens"], self.ended_row["billed_tokens"] = cached_tokens, billed_tokens
        self.row_json = strict_json.write_with_replacements(self.ended_row)
        return self.row_json

    def row(self) -> dict[str, Any]:
        return self.ended_row if self.ended_row is not None else self._built(0, 0, "none")

    def _built(self, prompt_tokens: int, completion_tokens: int, tokens_from: str) -> dict[str, Any]:
        row = self.opening_fields()
        row["answered_as"] = self.answered_as
        row["backend"] = self.backend
        row["attempts"] = [attempt.row() for attempt in self.attempts]
        row["status"] = self.status
        row["outcome"] = self.outcome
        row["detail"] = self.detail
        row["prompt_tokens"] = prompt_tokens
        row["completion_tokens"] = completion_tokens
        row["cached_tokens"] = row["billed_tokens"] = None
        row["translated_to"] = self.translated_to
        row["dropped"] = ", ".join(self.dropped) if self.dropped else ""
        row["tokens_from"] = tokens_from
        row["bytes_out"] = self.bytes_out
        row["queue_ms"] = round(self.queue_ms, 3)
        row["ttfb_ms"] = None if self.first_byte_at is None else _ms(self.first_byte_at - self.began)
        row["total_ms"] = _ms(time.monotonic() - self.began)
        self._add_seconds(row)
        return row

    def _add_seconds(self, row: dict[str, Any]) -> None:
        usage, backend_s, estimated_s = self.usage, self.backend_s, self.estimated_s
        row["load_ms"] = None if usage.load_s is None else _ms(usage.load_s)
        row["prefill_ms"] = None if usage.prefill_s is None else _ms(usage.prefill_s)
        row["decode_ms"] = None if usage.decode_s is None else _ms(usage.decode_s)
        row["backend_ms"] = None if backend_s is None else _ms(backend_s)
        row["seconds_from"] = self.seconds_from
        row["loaded"] = bool(self.loaded)
        row["chosen_because"] = self.chosen_because
        row["estimated_ms"] = None if estimated_s is None else _ms(estimated_s)
        row["queue_position"] = self.queue_position


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
