"""The shape of the code: imports go down, each library has its home, what decides makes no I/O, functions stay small."""

import ast
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.support.project import PROJECT

SOURCES = PROJECT / "gateway"

# From the top down: a package imports only what stands after it; names with a blank between them do not know each other.
ORDER = """__main__ | ops.main | ops.doctor ops.drill | ops.cli | ops.local | app | endpoints | components pages
           | admin edge | proxy telemetry | audit | auth | fleet limits | fleet.backends | dialects stores | core"""
FLOOR_OF = {package: number for number, floor in enumerate(ORDER.split("|")) for package in floor.split()}
KNOW_THE_SETTINGS = "ops app endpoints components".split()
SETTINGS_KNOW = set("fleet.aliases fleet.backends.config stores.urls core.errors core.millionths core.setting_names".split())
# Packages and modules that may import a library.
HOMES = {
    "orjson": "core.strict_json",
    "asyncpg": "stores",
    "redis": "stores",
    "hiredis": "stores.redis_connection",
    "argon2": "components auth",
    "aiohttp": "fleet.backends ops.drill.client",
    "backports": "proxy.content_encoding",
    # Of Python's own library from 3.14 on.
    "compression": "proxy.content_encoding",
    "yarl": "fleet.backends",
    "uvicorn": "edge ops.local.demo_backend",
    "httptools": "edge.protocol",
    "uvloop": "edge.server",
    "prometheus_client": "telemetry.metrics",
    "starlette.types": "endpoints admin edge pages proxy telemetry core",
    "starlette.config": "settings ops.cli.installation",
    "starlette.routing": "edge.router ops.local.demo_backend",
    # They wrap the request and hide a client's disconnect.
    "starlette.applications": "ops.local.demo_backend",
    "starlette.requests": "ops.local.demo_backend",
    "starlette.responses": "ops.local.demo_backend",
}
# These decide: values in, values out. They import each other and, of Python's library, what has no I/O.
PURE = """proxy.suggestions proxy.visibility edge.request_head audit.prompt_log audit.record audit.token_usage
          auth.key auth.key_format auth.key_view fleet.affinity fleet.aliases fleet.attempt fleet.catalog
          fleet.cost_means fleet.eta fleet.observation fleet.output_lengths fleet.prompt_checksum fleet.redaction fleet.refusals
          fleet.runner_options fleet.scheduler fleet.slots fleet.ways fleet.backends.circuit_breaker
          fleet.backends.config limits.admission limits.estimates limits.fallback limits.quota dialects stores.urls
          core.errors core.millionths core.setting_names core.shared_bytes core.strict_json""".split()
# A candidate is a backend, whose state the scheduler reads.
PURE_KNOW = {("fleet.scheduler", "fleet.backends.backend")}
WITHOUT_IO = set(
    """base64 binascii collections dataclasses datetime difflib fnmatch functools hashlib itertools json math re secrets shlex
       struct time types typing urllib.parse zlib""".split()
)
READ_THE_ENVIRONMENT = """ops.cli.database ops.cli.installation ops.cli.serve ops.cli.top ops.local.servers ops.drill.command
                          ops.drill.environment stores.redis_keys""".split()
LONGEST_FUNCTION, LONGEST_MODULE, MEDIAN, NINETIETH = 60, 400, 9, 35


@cache
def trees() -> dict[str, ast.Module]:
    """Read when the first test asks: a worker that runs none of them does without."""
    paths = (path for path in sorted(SOURCES.rglob("*.py")) if path.name != "__init__.py")
    return {".".join(path.relative_to(SOURCES).with_suffix("").parts): ast.parse(path.read_text("utf-8")) for path in paths}


@cache
def imported(module: str) -> frozenset[str]:
    """Dotted names, wherever in the module they are imported; `from a import b` gives both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports in full"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def imported_of_ours(module: str) -> set[str]:
    return {name.removeprefix("gateway.") for name in imported(module)} & trees().keys()


def imported_of_others(module: str) -> set[str]:
    return {name for name in imported(module) if name.partition(".")[0] not in {"gateway", *sys.stdlib_module_names}}


def is_within(module: str, places: Iterable[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


@cache
def package_of(module: str) -> str:
    """The innermost package of the order that a module is in."""
    return max((package for package in FLOOR_OF if is_within(module, [package])), key=len, default="")


def modules() -> list[str]:
    return [module for module in trees() if module != "settings"]


def functions() -> Iterator[tuple[str, int]]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1


def nodes(modules: Iterable[str], *kinds: type[ast.AST]) -> list[str]:
    return [f"{module}:{node.lineno}" for module in modules for node in ast.walk(trees()[module]) if isinstance(node, kinds)]  # type: ignore[attr-defined]


def test_each_module_is_in_a_package_of_the_order() -> None:
    assert [module for module in modules() if not package_of(module)] == []
    assert [package for package in FLOOR_OF if package not in map(package_of, modules())] == []
    assert len(list(SOURCES.glob("*.py"))) <= 6
    packages = (ast.parse(path.read_text("utf-8")) for path in SOURCES.rglob("__init__.py"))
    assert [node for tree in packages for node in tree.body if not isinstance(node, ast.Expr)] == [], "a package has no code"


def test_packages_import_downwards_only() -> None:
    upward = {
        f"{module} imports {other}"
        for module in modules()
        for other in imported_of_ours(module) - {"settings"}
        if package_of(other) != package_of(module) and FLOOR_OF[package_of(other)] <= FLOOR_OF[package_of(module)]
    }
    assert upward == set()


def test_packages_have_no_import_cycles() -> None:
    TopologicalSorter({module: imported_of_ours(module) for module in trees()}).prepare()


def test_only_the_composition_root_knows_the_settings() -> None:
    assert [name for name in trees() if "settings" in imported_of_ours(name) and not is_within(name, KNOW_THE_SETTINGS)] == []
    assert imported_of_ours("settings") == SETTINGS_KNOW


@pytest.mark.parametrize("library", HOMES)
def test_each_library_has_its_home(library: str) -> None:
    users = {module for module in trees() if any(is_within(name, [library]) for name in imported(module))}
    assert {user for user in users if not is_within(user, HOMES[library].split())} == set()
    assert [home for home in HOMES[library].split() if not any(is_within(user, [home]) for user in users)] == []


def test_no_library_is_without_a_home() -> None:
    of_others = {(module, name) for module in trees() for name in imported_of_others(module)}
    assert {(module, name) for module, name in of_others if not is_within(name, HOMES)} == set()


def test_decisions_make_no_io() -> None:
    pure = [module for module in trees() if is_within(module, PURE)]
    assert [place for place in PURE if not any(is_within(module, [place]) for module in pure)] == []
    ours = {(module, other) for module in pure for other in imported_of_ours(module) if not is_within(other, PURE)}
    assert ours == PURE_KNOW
    of_python = {(module, name) for module in pure for name in imported(module) if is_within(name, sys.stdlib_module_names)}
    assert {(module, name) for module, name in of_python if not is_within(name, WITHOUT_IO)} == set()
    assert nodes([*pure, "settings"], ast.AsyncFunctionDef, ast.Await, ast.AsyncWith, ast.AsyncFor) == []
    called = {(module, call) for module in pure for call in calls(module)}
    assert {(module, call) for module, call in called if call in ("open", "print", "input")} == set()


def calls(module: str) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(trees()[module]) if isinstance(node, ast.Call)}


def test_the_environment_is_read_only_in_listed_modules() -> None:
    by_attribute = re.compile(r"Name\(id='os'[^()]*(\(\))?\), attr='(environ|getenv)'")
    readers = {module for module, tree in trees().items() if by_attribute.search(ast.dump(tree))}
    readers |= {module for module in trees() if {"os.environ", "os.getenv"} & imported(module)}
    assert readers == set(READ_THE_ENVIRONMENT)


def test_no_module_holds_state_in_globals_or_imports_by_name() -> None:
    assert nodes(trees(), ast.Global) == []
    by_name = {"__import__", "import_module", "importlib.import_module"}
    assert [module for module in trees() if calls(module) & by_name] == []


def test_functions_and_modules_are_small() -> None:
    assert [f"{name}: {length} lines" for name, length in functions() if length > LONGEST_FUNCTION] == []
    lengths = sorted(length for _, length in functions())
    assert statistics.median(lengths) <= MEDIAN
    assert lengths[int(0.9 * (len(lengths) - 1))] <= NINETIETH
    of_modules = {path: len(Path(path).read_text("utf-8").splitlines()) for path in SOURCES.rglob("*.py")}
    assert [f"{path}: {length} lines" for path, length in of_modules.items() if length > LONGEST_MODULE] == []
