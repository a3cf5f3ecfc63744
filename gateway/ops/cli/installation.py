"""The installation that a command works on: the one the environment names, else the local run of this folder."""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from starlette.config import Config

from gateway import settings
from gateway.core.errors import CommandFailed, SettingsError
from gateway.ops.cli import console
from gateway.ops.local import stores as local_stores
from gateway.settings import Settings

LOCAL = settings.LOCAL_RUN
RUN_FACTS = "run.json"
# For one person's own machine: photos, long prompts and answers of agents, and all their turns in a row.
LIMITS_OF_RUN = {
    "DEFAULT_RPM": "6000",
    "DEFAULT_TPM": "100000000",
    "DEFAULT_CONCURRENT": "64",
    "MAX_REQUEST_BODY_BYTES": "33554432",
}
DEFAULTS_OF_RUN = {"GATEWAY_BIND_HOST": "127.0.0.1", "GATEWAY_LOG_FORMAT": "console", **LIMITS_OF_RUN}
OLLAMA_HERE = "http://127.0.0.1:11434"


def project() -> Path:
    return Path.cwd()


def read(overrides: dict[str, tuple[str, str]] | None = None) -> Settings:
    return settings.load(os.environ, project() / ".env", overrides)


def _of_run() -> dict[str, tuple[str, str]]:
    return {name: (value, LOCAL) for name, value in DEFAULTS_OF_RUN.items()}


def shown() -> Settings:
    """The settings in force: of the local run, unless the environment names a database or this is a compose project."""
    named = read()
    is_named = named.sources["database_url"] != "default" or _is_for_containers()
    return named if is_named else read(_of_run())


@contextmanager
def stores_of(*, run: bool = False) -> Iterator[Settings]:
    """The settings in force, with the local run's defaults and private stores where the environment names none."""
    named = read(_of_run() if run else None)
    folder = local_stores.data_folder(project())
    missing = [name for name in ("database_url", "redis_url") if named.sources[name] == "default"]
    needs_local = "database_url" in missing or (missing and (run or local_stores.is_running(folder)))
    if not needs_local:
        yield named
        return
    if not run and _is_for_containers():
        console.notify(
            "these are the stores of the local run; for the containers use docker compose exec gateway python -m gateway …"
        )
    try:
        with local_stores.stores(folder, notify=console.notify) as stores:
            found = {"DATABASE_URL": (stores.database_url, LOCAL), "REDIS_URL": (stores.redis_url, LOCAL)}
            found["OLLAMA_BASE_URL"] = (_backend_of_run(folder), LOCAL)
            yield read({**found, **_of_run()})
    except local_stores.LocalStoresFailed as failed:
        raise CommandFailed(str(failed)) from None


def _is_for_containers() -> bool:
    file = project() / ".env"
    return file.is_file() and bool(Config(file, environ={})("POSTGRES_PASSWORD", default=""))


def _backend_of_run(folder: Path) -> str:
    try:
        return str(json.loads((folder / RUN_FACTS).read_text())["ollama_base_url"])
    except (OSError, ValueError, KeyError, TypeError):
        return OLLAMA_HERE


def note_backend_of_run(url: str) -> None:
    """For other commands, which use the backend that the run chose."""
    folder = local_stores.data_folder(project())
    (folder / RUN_FACTS).write_text(json.dumps({"ollama_base_url": url}))


def for_serving() -> Settings:
    """The settings of a deployment. Raises SettingsError if a store is not named or a secret can be guessed."""
    named = read()
    if not named.database_url:
        raise SettingsError("DATABASE_URL must be set, as postgresql+asyncpg://user:password@host/database (or use `make run`)")
    settings.refuse_weak_secrets(named)
    return named


async def show_config(settings: Settings, arguments: argparse.Namespace) -> None:
    rows = [{"name": name, "value": value, "from": source} for name, value, source in settings.shown()]
    console.show(rows, as_json=arguments.json, empty="")
