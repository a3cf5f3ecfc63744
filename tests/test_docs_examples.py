"""The examples of the documents can be parsed, and run against a gateway."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from gateway import endpoints, settings
from gateway.auth.key import ADMIN
from gateway.ops.cli import installation, serve
from tests.conftest import StartGateway
from tests.support import documents
from tests.support.documents import section
from tests.support.fake_backend.backend import FakeBackend
from tests.support.running_gateway import RunningGateway

PAGES = documents.pages()
LOCAL_ADDRESS = "http://127.0.0.1:8080"

# Examples


def examples(language: str) -> list[Any]:
    return [
        pytest.param(text, id=f"{name}-{number}")
        for name, content in PAGES.items()
        for number, text in enumerate(documents.blocks(content, language))
    ]


@pytest.mark.parametrize("text", examples("sh"))
def test_shell_examples_can_be_parsed(text: str) -> None:
    done = subprocess.run(["sh", "-n"], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("text", examples("yaml"))
def test_yaml_examples_can_be_parsed(text: str) -> None:
    assert yaml.safe_load(text)


def test_examples_of_backends_can_be_loaded() -> None:
    found = [
        (name, json_text) for name, content in PAGES.items() for json_text in re.findall(r"OLLAMA_BACKENDS='([^']+)'", content)
    ]
    assert len(found) >= 2
    for _, json_text in found:
        environ = {"OLLAMA_BACKENDS": json_text.replace("…", "a-token-of-the-operator")}
        assert len(settings.load(environ, None).backends) >= 2


@pytest.fixture
def gateway(start_gateway: StartGateway) -> Iterator[RunningGateway]:
    with FakeBackend(models=["llama3.2:latest"], name="alpha") as alpha:
        yield start_gateway(alpha)


def runnable(text: str, gateway: RunningGateway, key: str) -> str:
    assert LOCAL_ADDRESS in text
    return text.replace(LOCAL_ADDRESS, gateway.url).replace("nz_…", key)


@pytest.mark.parametrize("text", examples("python"))
def test_python_examples_run(text: str, gateway: RunningGateway) -> None:
    code_text = runnable(text, gateway, gateway.key())
    done = subprocess.run([sys.executable, "-c", code_text], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alpha heard: Hello"


@pytest.mark.parametrize("text", [found for found in examples("sh") if "curl " in found.values[0]])
def test_curl_examples_run(text: str, gateway: RunningGateway) -> None:
    key = gateway.key(flags=(ADMIN,))
    [command] = re.findall(r"^((?:[^\n]*\\\n)*[^\n]*curl (?:[^\n]*\\\n)*[^\n]*)$", text, re.MULTILINE)
    done = subprocess.run(
        ["sh", "-c", f"{runnable(command, gateway, key)} --fail --silent --show-error"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, "ADMIN_KEY": key},
    )
    assert done.returncode == 0, done.stderr
    assert "data: [DONE]" in done.stdout or json.loads(done.stdout)


def test_the_quick_start_shows_what_make_run_prints() -> None:
    (shown,) = documents.blocks(section("README.md", "Quick start"), "text")
    local = {name: (value, installation.LOCAL) for name, value in installation.DEFAULTS_OF_RUN.items()}
    banner = serve.banner(settings.load({}, None, local), None, "nz_…").replace('"MODEL"', '"llama3.2:latest"')
    printed = set(banner.replace(serve._advice(None), "").splitlines())
    assert {line for line in shown.splitlines() if line not in printed} == {
        "  backend   default at http://127.0.0.1:11434: llama3.2:latest"
    }


def test_the_documents_name_every_path(start_gateway: StartGateway) -> None:
    enabled = {f"{name}_ENABLED": "true" for name in ("DASHBOARD", "PLAYGROUND", "DOCS")}
    with FakeBackend(models=["llama3.2:latest"], name="alpha") as alpha:
        gateway = start_gateway(alpha, METRICS_TOKEN="a-token-of-the-operator", **enabled)
        paths = {path.replace("{id:path}", "{id}") for _, path in endpoints.table(gateway.settings, gateway.components)}
    named = "\n".join(text for name, text in PAGES.items() if name.startswith("docs/"))
    files = re.compile(r"/(dashboard|playground|docs)/.*")
    assert {path for path in paths if path not in named and not files.fullmatch(path)} == set()
