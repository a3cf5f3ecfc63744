"""A call to a backend that did not lead to an answer: one row in the `attempts` of the audit."""

from dataclasses import dataclass
from typing import Any

# The fault of a backend that works, but cannot do what the request needs.
CANNOT = "cannot"
# The faults of calls that did not reach the backend.
NOT_SENT = frozenset({"unreachable", "connect_timeout", "full"})


@dataclass(slots=True)
class Attempt:
    backend: str
    fault: str
    ms: float
    detail: str = ""

    @property
    def occupied_s(self) -> float:
        """For how long the backend was occupied."""
        return 0.0 if self.fault in NOT_SENT else self.ms / 1000

    def row(self) -> dict[str, Any]:
        row = {"backend": self.backend, "fault": self.fault, "ms": round(self.ms, 3)}
        return {**row, "detail": self.detail} if self.detail else row
