"""Log lines as JSON or for a console, one per request and event; they never contain secrets."""

import asyncio
import logging
import sys
import time
from functools import lru_cache
from typing import Any, TextIO

from gateway.core import strict_json

REQUESTS = logging.getLogger("gateway.request")
HELD_S, MOST_HELD = 0.05, 500
REST = {
    level: b'"level":"%b","logger":"gateway.request","message":"request",' % name
    for level, name in ((logging.DEBUG, b"debug"), (logging.INFO, b"info"), (logging.WARNING, b"warning"))
}
# The handler for the JSON lines of requests, which bypass logging; empty if they go through logging.
_direct: "list[Lines]" = []


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        more = dict(getattr(record, "fields", {}))
        if record.exc_info:
            more["exception"] = self.formatException(record.exc_info)
        return json_line(record.created, record.levelname, record.name, record.getMessage(), more).decode()


def json_line(when: float, level: str, logger: str, message: str, fields: dict[str, Any]) -> bytes:
    line = {"time": _timestamp(when), "level": level.lower(), "logger": logger, "message": message, **fields}
    return strict_json.write_with_replacements(line)


class ConsoleLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = getattr(record, "fields", {})
        facts = "  ".join(f"{name}={_word(value)}" for name, value in fields.items() if value not in (None, "", []))
        line = f"{clock} {record.levelname[:4]:<4} {record.getMessage()}" + (f"  {facts}" if facts else "")
        return line + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")


def _word(value: object) -> str:
    # A value may come from a client: control characters must not reach a terminal.
    shown = str(value)
    return shown if shown.isprintable() and " " not in shown else ascii(shown)


@lru_cache(maxsize=4)
def _second(when: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(when))


def _timestamp(when: float) -> str:
    return f"{_second(int(when))}.{int(when % 1 * 1000):03d}Z"


class Lines(logging.StreamHandler[TextIO]):
    """Writes lines to a stream; the many lines of requests are written in batches."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._held: list[bytes] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.flush()
        super().emit(record)

    def hold(self, line: bytes) -> None:
        self._held.append(line)
        if len(self._held) == 1:
            asyncio.get_running_loop().call_later(HELD_S, self.flush)
        elif len(self._held) >= MOST_HELD:
            self.flush()

    def flush(self) -> None:
        if self._held:
            held, self._held = self._held, []
            self.stream.write(b"\n".join(held).decode("utf-8", "replace") + "\n")
        super().flush()


def configure(level: str, style: str) -> None:
    handler = Lines(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else ConsoleLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("uvicorn.error").setLevel(max(logging.getLevelName(level), logging.WARNING))
    _direct[:] = [handler] if style == "json" else []


def request_line(status: int, fields: dict[str, Any], as_json: bytes, usual: int = logging.INFO) -> None:
    """Logs the end of a request; `as_json` are the fields if already serialized, `usual` is the level without an error."""
    level = logging.WARNING if status >= 500 else usual
    if not REQUESTS.isEnabledFor(level):
        return
    if not _direct:
        REQUESTS.log(level, "request", extra={"fields": fields})
    elif as_json:
        # The same line as logging makes, without a log record and a search for the caller.
        _direct[0].hold(b'{"time":"%b",%b%b' % (_timestamp(time.time()).encode(), REST[level], as_json[1:]))
    else:
        _direct[0].hold(json_line(time.time(), logging.getLevelName(level), REQUESTS.name, "request", fields))
