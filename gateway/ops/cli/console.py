"""Output for operators: aligned tables or JSON on standard output, progress and errors on standard error."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def notify(text: str) -> None:
    """A message on standard error: progress, or an error."""
    print(text, file=sys.stderr, flush=True)


def show(rows: Sequence[Mapping[str, Any]], *, as_json: bool, empty: str) -> None:
    """Rows as an aligned table with the keys as its header, or as a JSON list."""
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


def plain(line: str) -> str:
    """Names and errors may come from anywhere: control characters must not reach a terminal."""
    return "".join(character if character.isprintable() else "?" for character in line)


def _jsonable(value: Any) -> Any:
    return value.isoformat() if isinstance(value, date) else list(value)


class Table:
    """A table of any length; its first page decides the widths of the columns."""

    PAGE = 200

    def __init__(self) -> None:
        self._page: list[list[str]] = []
        self._widths: list[int] = []

    def add(self, row: Mapping[str, Any]) -> None:
        if not self._page and not self._widths:
            self._page.append([name.replace("_", " ").upper() for name in row])
        self._page.append([cell(value) for value in row.values()])
        if self._widths or len(self._page) > self.PAGE:
            self.end()

    def end(self) -> None:
        if not self._widths:
            self._widths = [max(map(len, column)) for column in zip(*self._page, strict=True)]
        for row in self._page:
            print("  ".join(map(str.ljust, row, self._widths)).rstrip())
        self._page.clear()


class Lines:
    """One JSON object per line."""

    def add(self, row: Mapping[str, Any]) -> None:
        print(json.dumps(dict(row), default=_jsonable))

    def end(self) -> None:
        pass


class Csv:
    """Comma-separated values with a header line; None is an empty field."""

    def __init__(self) -> None:
        self._writer = csv.writer(sys.stdout, lineterminator="\n")
        self._has_head = False

    def add(self, row: Mapping[str, Any]) -> None:
        if not self._has_head:
            self._writer.writerow(row)
            self._has_head = True
        self._writer.writerow([_plain(value) for value in row.values()])

    def end(self) -> None:
        pass


def printer(*, as_json: bool, as_csv: bool) -> Table | Lines | Csv:
    return Lines() if as_json else Csv() if as_csv else Table()


def _plain(value: Any) -> Any:
    """Spreadsheets treat a value that begins like this as a formula; names and agents may come from anybody."""
    if isinstance(value, str) and value.startswith(FORMULAS):
        return f"'{value}"
    return json.dumps(value) if isinstance(value, list | dict) else _jsonable(value) if isinstance(value, date) else value
