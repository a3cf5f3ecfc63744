"""Tables, lists and numbers of the documents are those of the code."""

import ast
import json
import operator
import re
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from gateway import settings
from gateway.audit.record import Record
from gateway.dialects import refused_fields
from gateway.dialects.registry import dialects
from gateway.dialects.translation.translators import TRANSLATORS
from gateway.ops.cli import installation
from gateway.ops.drill import faults
from tests.support import documents
from tests.support.documents import page, section
from tests.support.project import PROJECT
from tests.system import test_costs

ROOT = PROJECT
OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.Sub: operator.sub,
}
SETTINGS = "docs/reference/settings.md"
# What a page states, and the constants of the code that say so.
STATED = [
    ("docs/operations.md", "65,536 bytes, 256 lines, 10 s", {"LARGEST_HEAD": 65_536, "MOST_LINES": 256, "HEAD_DEADLINE_S": 10}),
    ("docs/operations.md", "`MAX_REQUEST_BODY_BYTES`, 30 s", {"BODY_DEADLINE_S": 30}),
    ("docs/operations.md", "60 s for each piece", {"PIECE_DEADLINE_S": 60, "UPLOAD_WITHIN_S": 60, "SLOWEST_UPLOAD": 65_536}),
    ("docs/operations.md", "above 1 MiB they are in the folder", {"MOST_IN_MEMORY": 2**20}),
    ("docs/operations.md", "32 MiB, or four of the largest", {"BYTES_PER_KEY": 32 * 2**20, "LARGEST_BODIES_PER_KEY": 4}),
    ("docs/operations.md", "128 MiB, or 16 of the largest", {"BYTES_IN_ALL": 128 * 2**20, "LARGEST_BODIES_IN_ALL": 16}),
    ("docs/operations.md", "bodies above 16 KiB", {"LARGEST_WITHOUT_TURN": 16_384}),
    ("docs/operations.md", "in pieces of at most 256 KiB", {"LARGEST_PIECE_WRITTEN": 2**18}),
    ("docs/operations.md", "1,000 gzip members or zstd frames; a window of 8 MiB", {"MOST_MEMBERS": 1000, "WINDOW_LOG": 23}),
    ("docs/operations.md", "if a turn does not come in 20 s", {"LONGEST_WAIT_S": 20}),
    ("docs/operations.md", "earlier answers are unread | 64 MiB", {"MOST_HELD_BY_ALL": 64 * 2**20}),
    (
        "docs/operations.md",
        "not streamed | 64 MiB; above 256 KiB",
        {"LONGEST_WHOLE_ANSWER": 64 * 2**20, "LARGEST_READ_WHOLE": 2**18},
    ),
    ("docs/operations.md", "first frame of a stream | 8 MiB", {"LONGEST_FRAME": 8 * 2**20}),
    ("docs/operations.md", "one backend | 32 MiB over all its calls", {"MOST_UNFRAMED": 32 * 2**20}),
    ("docs/operations.md", "a minute, and a second for each 64 KiB", {"READ_WITHIN_S": 60, "SLOWEST_CLIENT": 65_536}),
    ("docs/operations.md", "at most 65,536); the others are for backends", {"MOST_DESCRIPTORS": 65_536}),
    ("docs/operations.md", "work for 15 minutes after their last check", {"VALID_WITHOUT_DATABASE_S": 900}),
    (
        "docs/operations.md",
        "up to 25,000 for each sixteenth of the keys, and 500 prompts",
        {"MOST_ROWS": 25_000, "MOST_PROMPTS": 500},
    ),
    ("docs/operations.md", "Calls on the path of a request end after 50 ms", {"CALL_DEADLINE_S": 0.05}),
    ("docs/models.md", "opens after 3 failures in a row", {"FAILURES_UNTIL_OPEN": 3}),
    ("docs/models.md", "after 5 s, and later after up to 60 s", {"FIRST_PAUSE_S": 5, "LONGEST_PAUSE_S": 60}),
    ("docs/models.md", "for at most two seconds: what was pulled", {"MODELS_CHANGED_S": 2}),
    ("docs/keys-and-limits.md", "A slot is a lease of 25 seconds", {"LEASE_MS": 25_000}),
    ("docs/keys-and-limits.md", "at most 100 for a key and 1,000 in a process", {"WAITING_PER_KEY": 100, "WAITING": 1000}),
    ("docs/keys-and-limits.md", "one of two threads", {"THREADS": 2}),
    ("docs/keys-and-limits.md", "a frame of more than 600 bytes", {"LONGEST_FRAME_OF_A_TOKEN": 600}),
    ("docs/keys-and-limits.md", "about four letters for a token", {"LETTERS_PER_TOKEN": 4}),
    ("docs/reference/errors.md", "a body may have at most 300,000 values", {"MOST_VALUES": 300_000}),
    ("docs/decisions/0006-argon2.md", "Two threads check keys", {"THREADS": 2}),
]
SUBJECTS = {
    "this gateway": "gateway",
    "plain Starlette + aiohttp": "Starlette + aiohttp",
    "plain Starlette + httpx": "Starlette + httpx",
    "nginx": "nginx",
}
# As the table of the speed shows them: scenario, figure, unit, digits.
COLUMNS_OF_SPEED: list[tuple[str, tuple[str, ...], float, int]] = [
    ("whole answers, 32 connections", ("rps",), 1, 0),
    ("whole answers, 32 connections", ("cpu_us_req",), 1, 0),
    ("whole answers, 1 connection", ("lat", "p50"), 1000, 2),
    ("100 requests/s", ("lat", "p99"), 1000, 1),
    ("200 streams of 50 chunks/s", ("cpu_us_chunk",), 1, 0),
    ("1,000 streams of 20 chunks/s", ("lag", "p99"), 1000, 1),
]

# Settings


def accepted(declared: Any) -> str:
    """What a setting may be, in the words that refuse a wrong value; "" if it may be anything."""
    try:
        declared.metadata["read"]("\0 ;")
    except ValueError as wrong:
        return str(wrong).partition(" ('")[0]
    return ""


def rows_of_settings() -> dict[str, tuple[str, str]]:
    rows = [row for row in documents.tables(page(SETTINGS)) if len(row) == 4]
    return {name.strip("`"): (default.strip("`"), values) for name, default, values, _ in rows}


def test_the_page_of_settings_has_every_default_and_its_values() -> None:
    listed = rows_of_settings()
    real = {found.name.upper(): (found.metadata["default"], accepted(found)) for found in settings.declarations()}
    assert sorted(listed) == sorted(real)
    assert {name: default for name, (default, _) in listed.items()} == {name: default for name, (default, _) in real.items()}
    assert {name: values for name, (_, values) in listed.items() if real[name][1]} == {
        name: values for name, (_, values) in real.items() if values
    }


def test_the_page_of_settings_marks_the_secrets() -> None:
    marked = {row[0].strip("`") for row in documents.tables(page(SETTINGS)) if "*secret*" in row[-1]}
    assert marked == {found.name.upper() for found in settings.declarations() if found.metadata["secret"]}


def test_the_page_of_settings_has_what_only_compose_reads() -> None:
    spans = set(documents.spans(section(SETTINGS, "Compose only")))
    assert {span for span in spans if span.isupper() and not span.endswith("_FILE")} == set(settings.COMPOSE_ONLY)


def test_the_page_of_settings_has_the_defaults_of_the_local_run() -> None:
    rows = documents.tables(section(SETTINGS, "The local run"))
    assert {name.strip("`"): value.strip("`") for name, value in rows} == installation.DEFAULTS_OF_RUN


# What the pages state as numbers and lists


@cache
def constants() -> dict[str, set[object]]:
    """The values of the constants of all modules, by their names; two modules may have one of the same name."""
    found: dict[str, set[object]] = {}
    for path in (ROOT / "gateway").rglob("*.py"):
        for name, value in assigned(ast.parse(path.read_text(encoding="utf-8"))):
            try:
                found.setdefault(name, set()).add(calculated(value))
            except TypeError:
                continue
    return found


def assigned(module: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names and what is assigned to them, also of `A, B = 1, 2`."""
    for node in module.body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for one, its in zip(target.elts, value.elts, strict=True) if several else [(target, value)]:  # type: ignore[attr-defined]
                if isinstance(one, ast.Name):
                    yield one.id, its


def calculated(value: ast.expr) -> float:
    """A number, or a sum, product or power of numbers; raises TypeError for all else."""
    if isinstance(value, ast.Constant) and isinstance(value.value, int | float):
        return value.value
    if isinstance(value, ast.BinOp) and type(value.op) in OPERATORS:
        return OPERATORS[type(value.op)](calculated(value.left), calculated(value.right))
    raise TypeError


@pytest.mark.parametrize(("name", "words", "values"), STATED)
def test_numbers_of_the_pages_are_those_of_the_code(name: str, words: str, values: dict[str, float]) -> None:
    assert words in " ".join(page(name).split()), f"{name} no longer says {words!r}: change the list STATED, too"
    known = constants()
    for constant, value in values.items():
        assert value in known.get(constant, set()), f"{name} says {words!r}, but {constant} is {known.get(constant, 'gone')}"


def test_the_page_of_logs_has_only_real_fields() -> None:
    rows = documents.tables(section("docs/reference/logs.md", "The line of a request"))
    listed = [field for fields, _ in rows for field in re.findall(r"`(\w+)`", fields)]
    assert sorted(listed) == sorted(Record("id", "id", "GET").row())


def test_outcomes_of_the_page_of_logs_are_in_the_code() -> None:
    rows = documents.tables(section("docs/reference/logs.md", "Outcomes"))
    listed = {outcome for outcomes, _ in rows for outcome in re.findall(r"`([a-z_]+)`", outcomes)}
    code_text = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "gateway").rglob("*.py"))
    assert {outcome for outcome in listed if f'"{outcome}"' not in code_text} == set()
    assert listed >= set(re.findall(r'outcome(?:,.*?)? = (?:record\.outcome or )?"(\w+)"', code_text))


def test_the_page_of_clients_lists_exactly_the_served_routes() -> None:
    table = section("docs/clients.md", "Routes")
    listed = set(re.findall(r"/(?:v1|v2|api)/[\w/{}]+|/rerank", table))
    operations = {operation.path for dialect in dialects().values() for operation in dialect.operations}
    assert listed == operations | {"/v1/models", "/v1/models/{id}", "/api/tags", "/api/ps", "/api/version"}


def test_the_table_of_kinds_is_that_of_the_dialects() -> None:
    rows = documents.tables(section("docs/translation.md", "Which backends serve which route"))
    listed = {
        route.strip("`").removeprefix("POST "): tuple(words in ("yes", "if the server has it") for words in kinds)
        for route, *kinds in rows
    }
    optional = {route.strip("`").removeprefix("POST ") for route, *kinds in rows if "if the server has it" in kinds}
    operations = [operation for dialect in dialects().values() for operation in dialect.operations]
    assert listed == {operation.path: ("ollama" in operation.kinds, "openai" in operation.kinds) for operation in operations}
    assert optional == {operation.path for operation in operations if operation.is_optional and operation.kinds}
    translated = {route.strip("`").removeprefix("POST ") for route, *kinds in rows if "translated" in " ".join(kinds)}
    assert translated == TRANSLATORS.keys()


def test_refused_fields_of_the_pages_are_refused() -> None:
    rows = documents.tables(section("docs/translation.md", "Refused fields"))
    listed = {field for _, fields in rows for field in re.findall(r"`(\w+)`", fields)}
    assert len(listed) > 8 and listed <= refused_fields.REFUSED_FIELDS | {refused_fields.PRIORITY}
    extras = set(
        re.findall(r"`(\w+)`", section("docs/translation.md", "Refused fields").rpartition("\n\n")[0].split("\n\n")[-1])
    )
    assert extras - {"gateway"} >= refused_fields.EXTRAS


def test_the_table_of_speed_is_that_of_the_published_figures() -> None:
    figures = json.loads((ROOT / "tests" / "bench" / "results" / "results.json").read_text(encoding="utf-8"))

    def median(subject: str, scenario: str, *path: str) -> float | None:
        found: list[Any] = figures["runs"][SUBJECTS[subject]].get(scenario, [])
        for step in path:
            found = [one[step] for one in found]
        return statistics.median(found) if found else None

    rows = documents.tables(section("docs/scaling-and-speed.md", "Speed"))
    assert [row[0] for row in rows] == [*SUBJECTS]
    for subject, *cells in rows:
        for cell, (scenario, path, unit, digits) in zip(cells, COLUMNS_OF_SPEED, strict=True):
            value = median(subject, scenario, *path)
            shown = "-" if value is None else f"{value / unit:,.{digits}f}"
            assert cell.split()[0] == shown, f"{subject}: {scenario}"


def test_costs_that_the_pages_name_are_within_the_bounds_of_their_test() -> None:
    words = " ".join(section("docs/scaling-and-speed.md", "Speed").split())
    found = re.search(r"more than (\d+) function calls .*? (\d+) function calls for a frame", words)
    assert found and tuple(map(int, found.groups())) == (test_costs.MOST_CALLS, test_costs.MOST_CALLS_PER_FRAME)


def test_lines_of_the_drill_that_the_pages_name_exist() -> None:
    known = {fault.name for fault in faults.FAULTS}
    named = {
        name for text in documents.pages().values() for names in re.findall(r'ONLY="([a-z ]+)"', text) for name in names.split()
    }
    assert named and named <= known


def test_promises_that_the_drill_prints_are_in_the_list() -> None:
    listed = [number for number, _ in documents.tables(section("docs/operations.md", "Promises"))]
    printed = {fault.promise for fault in faults.FAULTS} - {"-"}
    assert len(listed) == len(set(listed)) and printed <= set(listed)
