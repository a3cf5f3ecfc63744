"""What operators read: aligned tables or JSON on standard output, progress and errors on standard error."""

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any


def say(text: str) -> None:
    """Progress, so that nobody waits in the dark."""
    print(text, file=sys.stderr, flush=True)


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str) -> None:
    """Rows as an aligned table with the keys as its head, or as a JSON list."""
    if as_json:
        print(json.dumps(rows, indent=2, default=_jsonable))
    elif rows:
        print(table(list(rows[0]), [list(row.values()) for row in rows]))
    else:
        print(empty)


def show_facts(facts: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2, default=_jsonable))
        return
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        print(f"{name:<{width}}  {cell(value)}")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[name.replace("_", " ").upper() for name in head], *([cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def cell(value: Any) -> str:
    if value is None or value in ([], ()):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    shown = str(value)
    return shown if shown.isprintable() else ascii(shown)


def _jsonable(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else list(value)
