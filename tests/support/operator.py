"""An operator who types verbs, with the settings of an installation."""

import json
import subprocess
from pathlib import Path

from tests.conftest import TestStores
from tests.support import fork_server
from tests.support.fake_backend.backend import FakeBackend
from tests.support.gateway_settings import entry_of, environment_for
from tests.support.processes import environment

CANARY = "canary-5e1b22"
Done = subprocess.CompletedProcess[str]


class Operator:
    """Types commands in a folder of its own, against the test's stores and backends."""

    def __init__(self, folder: Path, stores: TestStores) -> None:
        self.folder = folder
        self.names = environment_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)

    def types(self, *words: str, **names: str) -> Done:
        done = fork_server.gateway().run("gateway", words, self.folder, environment({**self.names, **names}))
        assert "Traceback" not in done.stderr + done.stdout
        return done

    def gets(self, *words: str, **names: str) -> str:
        done = self.types(*words, **names)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def gets_json(self, *words: str, **names: str) -> "JsonValue":
        return JsonValue(json.loads(self.gets(*words, "--json", **names)))

    def is_refused(self, *words: str, code: int = 1, **names: str) -> str:
        done = self.types(*words, **names)
        assert (done.returncode, done.stdout) == (code, "")
        return done.stderr

    def with_backends(self, *backends: FakeBackend, **more: str) -> None:
        self.names["OLLAMA_BACKENDS"] = json.dumps([entry_of(backend, **more) for backend in backends])


class JsonValue:
    """What a command printed for machines."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __getitem__(self, key: str | int) -> object:
        assert isinstance(self.value, dict | list)
        return self.value[key]  # type: ignore[index]

    @property
    def rows(self) -> list[dict[str, object]]:
        assert isinstance(self.value, list)
        return self.value
