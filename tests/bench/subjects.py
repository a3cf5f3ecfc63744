"""The servers to measure: each by itself on one core, in front of the same mock backend."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from gateway.ops.local import stores as local_stores
from tests.bench.tools import OTHER_CORE, SUBJECT_CORE, CannotMeasure, Tools, pinned
from tests.support.processes import descendants, environment, free_port, until
from tests.support.project import PROJECT

MODEL = "mock-model"
NOTHING: Mapping[str, str] = {}
NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off; keepalive_requests 100000000; client_body_buffer_size 64k;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream mock {{ server 127.0.0.1:{mock}; keepalive 4096; keepalive_requests 100000000; }}
  proxy_http_version 1.1; proxy_set_header Connection "";
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://mock; proxy_buffering off; }} }}
}}
"""


@dataclass
class Subject:
    name: str
    port: int
    pids: list[int] = field(default_factory=list)
    key: str = "none"
    names: dict[str, str] = field(default_factory=dict)


@contextmanager
def running(name: str, core: int, command: Sequence[str], port: int, names: dict[str, str], folder: Path) -> Iterator[Subject]:
    """A process with its children, ready when its port answers."""
    log = folder / f"{name.replace(' ', '_')}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            pinned(core, command), cwd=folder, env=environment(names), stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )
    try:
        until(lambda: process.poll() is not None or answers(port), 60)
        if process.poll() is not None:
            raise CannotMeasure(f"{name} did not start: {log.read_text()[-500:]}")
        yield Subject(name, port, sorted(descendants(process.pid) | {process.pid}))
    finally:
        process.terminate()
        process.wait(30)


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=2).status_code > 0
    except httpx.HTTPError:
        return False


@contextmanager
def mock(tools: Tools, folder: Path) -> Iterator[int]:
    port = free_port()
    with running("mock", OTHER_CORE, [tools.mock, str(port), "-n", "100", "-d", "0"], port, {}, folder):
        yield port


@contextmanager
def gateway(
    mock_port: int, folder: Path, entry: Sequence[str] = ("-m", "gateway"), more: Mapping[str, str] = NOTHING
) -> Iterator[Subject]:
    """The gateway with keys, audit, and limits that are counted but never reached."""
    port = free_port()
    backend = {"name": "mock", "kind": "openai", "base_url": f"http://127.0.0.1:{mock_port}", "max_connections": 10_000}
    with local_stores.stores(folder / "stores") as stores:
        names = {
            "DATABASE_URL": stores.database_url,
            "REDIS_URL": stores.redis_url,
            "OLLAMA_BACKENDS": json.dumps([backend]),
            "OLLAMA_SLOTS": "10000",
            "GATEWAY_BIND_HOST": "127.0.0.1",
            "GATEWAY_BIND_PORT": str(port),
            "GATEWAY_LOG_FORMAT": "json",
            "DEFAULT_RPM": "1000000000",
            "DEFAULT_TPM": "1000000000000",
            "DEFAULT_CONCURRENT": "1000000",
            "MAX_REQUEST_BODY_BYTES": "1000000",
            **more,
        }
        operate(names, folder, "migrate")
        key = operate(names, folder, "key", "--name", f"bench {port}").split()[-1]
        with running("gateway", SUBJECT_CORE, [sys.executable, *entry, "serve"], port, names, folder) as subject:
            subject.key, subject.names = key, names
            yield subject


def operate(names: dict[str, str], folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "gateway", *words]
    done = subprocess.run(command, cwd=folder, env=environment(names), capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotMeasure(f"{' '.join(words)}: {done.stderr[-500:]}")
    return done.stdout


@contextmanager
def plain(name: str, module: str, mock_port: int, folder: Path) -> Iterator[Subject]:
    port = free_port()
    names = {"UPSTREAM": f"http://127.0.0.1:{mock_port}"}
    options = ["--port", str(port), "--no-access-log", "--log-level", "warning"]
    command = [sys.executable, "-m", "uvicorn", f"{module}:app", *options]
    with running(name, SUBJECT_CORE, command, port, names, folder) as subject:
        yield subject


@contextmanager
def nginx(mock_port: int, folder: Path) -> Iterator[Subject]:
    port, home = free_port(), folder / "nginx"
    home.mkdir()
    (home / "nginx.conf").write_text(NGINX.format(folder=home, mock=mock_port, port=port))
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    with running(
        "nginx", SUBJECT_CORE, [str(program), "-p", str(home), "-c", str(home / "nginx.conf")], port, {}, home
    ) as subject:
        yield subject


@contextmanager
def litellm(python: str, mock_port: int, folder: Path) -> Iterator[Subject]:
    """LiteLLM's proxy, with one key and no database, from the given virtual environment."""
    port, key = free_port(), "sk-bench"
    target = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{mock_port}/v1", "api_key": "none"}
    listed = {"model_list": [{"model_name": MODEL, "litellm_params": target}], "general_settings": {"master_key": key}}
    (folder / "litellm.json").write_text(json.dumps(listed))
    program = str(Path(python).parent / "litellm")
    command = [program, "--config", str(folder / "litellm.json"), "--port", str(port), "--num_workers", "1"]
    with running("LiteLLM", SUBJECT_CORE, command, port, {}, folder) as subject:
        subject.key = key
        yield subject


@contextmanager
def all_of_them(tools: Tools, folder: Path, litellm_python: str = "") -> Iterator[tuple[list[Subject], Subject]]:
    """The gateway first, then the others; and the mock itself, for direct requests."""
    has_nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin") is not None
    with ExitStack() as stack:
        mock_port = stack.enter_context(mock(tools, folder))
        found = [
            stack.enter_context(gateway(mock_port, folder)),
            stack.enter_context(plain("Starlette + aiohttp", "tests.bench.pass_aiohttp", mock_port, folder)),
        ]
        if importlib.util.find_spec("httpx"):
            found.append(stack.enter_context(plain("Starlette + httpx", "tests.bench.pass_httpx", mock_port, folder)))
        if has_nginx:
            found.append(stack.enter_context(nginx(mock_port, folder)))
        if litellm_python:
            found.append(stack.enter_context(litellm(litellm_python, mock_port, folder)))
        yield found, Subject("direct", mock_port)


__all__ = ["PROJECT", "Subject", "all_of_them", "gateway", "mock", "nginx", "plain"]
