"""Log lines as JSON or for a console: one per request, one per event; secrets never get this far."""

import json
import logging
import sys
import time
from typing import Any

from gateway import strict_json

REQUESTS = logging.getLogger("gateway.request")


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return strict_json.write(line).decode()
        except TypeError:
            # Text that is no Unicode, such as half a surrogate pair out of a client's JSON.
            return json.dumps(line, default=str)


class ConsoleLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        told = getattr(record, "fields", {})
        facts = "  ".join(f"{name}={_word(value)}" for name, value in told.items() if value not in (None, "", []))
        line = f"{clock} {record.levelname[:4]:<4} {record.getMessage()}" + (f"  {facts}" if facts else "")
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def _word(value: object) -> str:
    # A name may come from a client: control characters must not reach a terminal.
    shown = str(value)
    return shown if shown.isprintable() and " " not in shown else ascii(shown)


def _timestamp(when: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when)) + f".{int(when % 1 * 1000):03d}Z"


def configure(level: str, style: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else ConsoleLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("uvicorn.error").setLevel(max(logging.getLevelName(level), logging.WARNING))


def request_line(fields: dict[str, Any]) -> None:
    level = logging.WARNING if fields["status"] >= 500 else logging.INFO
    if REQUESTS.isEnabledFor(level):
        REQUESTS.log(level, "request", extra={"fields": fields})
