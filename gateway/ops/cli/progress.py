"""Progress of a job, on standard error: a line for each backend that changes in place, or plain lines where nobody looks at
a terminal; or lines of JSON on standard output."""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from gateway.fleet.jobs import FAILED, RUNNING, Changes, Row, Rows
from gateway.ops.cli import console

UP, CLEAR_LINE = "\x1b[A", "\x1b[K"
# How often a plain line repeats what only grows.
PLAIN_EVERY_S = 10.0
UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class ProgressPrinter(Protocol):
    def show(self, rows: Rows) -> None: ...


class LinesInPlace:
    """For a terminal."""

    def __init__(self) -> None:
        self._drawn = 0

    def show(self, rows: Rows) -> None:
        columns, height = shutil.get_terminal_size()
        width = max((len(str(row["backend"])) for row in rows), default=0)
        shown = rows if len(rows) < height else rows[: max(1, height - 2)]
        lines = [in_words(row, width)[: columns - 1] + CLEAR_LINE for row in shown]
        if more := len(rows) - len(shown):
            lines.append(f"… and {more} more{CLEAR_LINE}")
        sys.stderr.write(UP * self._drawn + "\r" + "\n".join(lines) + "\n")
        sys.stderr.flush()
        self._drawn = len(lines)


class PlainLines:
    """For a file or a pipe: a line when a step begins, and every ten seconds."""

    def __init__(self) -> None:
        self._shown: dict[tuple[str, str], tuple[str, str, float]] = {}

    def show(self, rows: Rows) -> None:
        now = time.monotonic()
        for row in rows:
            name, step = (row["backend"], row["model"]), (row["state"], row["detail"])
            state, detail, at = self._shown.get(name, ("", "", -PLAIN_EVERY_S))
            if not row["detail"]:
                continue
            if (state, detail) != step or (row["state"] == RUNNING and now - at >= PLAIN_EVERY_S):
                self._shown[name] = *step, now
                console.notify(in_words(row))


class JsonLines:
    """Each row that has changed."""

    def __init__(self) -> None:
        self._changes = Changes()

    def show(self, rows: Rows) -> None:
        for row in self._changes.among(rows):
            print(json.dumps(row), flush=True)


def in_words(row: Row, width: int = 0) -> str:
    words = row["detail"] or row["state"]
    if row["state"] == FAILED:
        words = f"FAILED: {words}"
    elif row["state"] == RUNNING:
        words = "  ".join([words, *_transfer(row), f"({_time(row)})"])
    return console.plain(f"{row['backend']:<{width}}  {row['model']}  {words}")


def _transfer(row: Mapping[str, Any]) -> list[str]:
    if not row.get("total_bytes"):
        return []
    left = [f"{size(row['bytes_per_s'])}/s"] if row["bytes_per_s"] else []
    left += [f"{duration(row['eta_s'])} left"] if row["eta_s"] is not None else []
    return [f"{row['percent']:5.1f} %", f"{size(row['completed_bytes'])} of {size(row['total_bytes'])}", *left]


def _time(row: Mapping[str, Any]) -> str:
    expected_s = row.get("expected_s")
    return duration(row["seconds"]) + (f" of about {duration(expected_s)}" if expected_s else "")


def size(count: float | None) -> str:
    if count is None:
        return "-"
    unit, name = next(((unit, name) for unit, name in UNITS if count >= unit), (1.0, "B"))
    return f"{count / unit:.1f} {name}" if unit > 1 else f"{count:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{minutes} min" if hours < 2 else f"{hours} h {minutes % 60:02} min"


def printer(*, as_json: bool) -> ProgressPrinter:
    if as_json:
        return JsonLines()
    return LinesInPlace() if sys.stderr.isatty() else PlainLines()
