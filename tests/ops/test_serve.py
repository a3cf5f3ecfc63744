"""The gateway as a process: starting, draining, workers, being killed, and the one-command local run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from gateway.ops.cli import installation
from tests.conftest import StartGateway, TestStores
from tests.support.chat_requests import CHATS, MESSAGES
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.scripts import Hold
from tests.support.gateway_settings import entry_of, environment_for
from tests.support.processes import answers, descendants, environment, free_port, is_alive, operate, serving, until


def names_for(stores: TestStores, alpha: FakeBackend, **more: str) -> dict[str, str]:
    return environment_for(alpha, DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url, **more)


def make_key(folder: Path, names: dict[str, str]) -> str:
    return operate(folder, names, "key", "--name", f"key {time.monotonic_ns()}").splitlines()[-1]


@pytest.mark.long(seconds=10)
def test_it_drains_on_sigterm(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    names = names_for(stores, alpha)
    key = make_key(tmp_path, names)
    alpha.healthy.pieces, alpha.healthy.pause_s = 10, 0.15
    with serving(tmp_path, names) as (process, url, log):
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{url}/api/chat", json=CHATS[1].body, headers=headers, timeout=20) as stream:
            pieces = stream.iter_lines()
            first = next(pieces)
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{url}/readyz").status_code == 503, 2)
            assert httpx.get(f"{url}/healthz").status_code == 200
            refused = httpx.post(f"{url}/api/chat", json=CHATS[0].body, headers=headers)
            assert refused.status_code == 503 and refused.headers["retry-after"]
            rest = list(pieces)
        assert json.loads(first)["message"] and json.loads(rest[-1])["done"] is True
        assert process.wait(10) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    outcomes = [line["outcome"] for line in lines if line["message"] == "request"]
    assert outcomes == ["refused:shutting_down", "answered"]
    assert any(line["message"].startswith("draining: ") for line in lines)


@pytest.mark.parametrize(
    ("dialect", "number", "workers"),
    [("ollama", signal.SIGTERM, 1), ("openai", signal.SIGTERM, 1), ("openai", signal.SIGHUP, 1), ("openai", signal.SIGHUP, 2)],
)
def test_the_drain_limit_ends_streams_with_an_error_frame(
    stores: TestStores, alpha: FakeBackend, tmp_path: Path, dialect: str, number: signal.Signals, workers: int
) -> None:
    names = names_for(stores, alpha, GATEWAY_DRAIN_S="0.3", GATEWAY_WORKERS=str(workers))
    key = make_key(tmp_path, names)
    alpha.healthy.pieces, alpha.healthy.pause_s = 1000, 0.05
    chat = next(chat for chat in CHATS if chat.dialect == dialect and chat.streamed)
    with serving(tmp_path, names) as (process, url, _):
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", url + chat.path, json=chat.body, headers=headers, timeout=20) as stream:
            pieces = (line for line in stream.iter_lines() if line)
            next(pieces)
            process.send_signal(number)
            last = list(pieces)[-1]
        assert "shutting down" in str(json.loads(last.removeprefix("data: "))["error"])
        assert process.wait(10) == 0
    assert alpha.wait_idle(1.0)


@pytest.mark.parametrize("workers", [1, 2])
def test_nohup_keeps_it_running_without_its_terminal(
    stores: TestStores, alpha: FakeBackend, tmp_path: Path, workers: int
) -> None:
    """Whoever starts it so has said that a hang-up means nothing."""
    names = names_for(stores, alpha, GATEWAY_WORKERS=str(workers))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with serving(tmp_path, names) as (process, url, log):
            until(lambda: log.read_text().count("keys: argon2id") == workers, 20)
            for pid in {process.pid, *descendants(process.pid)}:
                os.kill(pid, signal.SIGHUP)
            time.sleep(0.3)
            assert answers(f"{url}/healthz") and "draining" not in log.read_text()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long(seconds=10)
def test_many_workers_share_one_port_and_are_replaced(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    names = names_for(stores, alpha, GATEWAY_WORKERS="3")
    key = make_key(tmp_path, names)
    with serving(tmp_path, names) as (process, url, log):
        until(lambda: len(descendants(process.pid)) == 3 and log.read_text().count("keys: argon2id") == 3, 20)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, timeout=20) as client:
            for _ in range(10):
                answer = client.chat.completions.create(model="llama3.2", messages=MESSAGES)
                assert answer.choices[0].message.content == "alpha heard: Say hi"
            victim = min(descendants(process.pid))
            os.kill(victim, signal.SIGKILL)
            until(lambda: victim not in descendants(process.pid) and len(descendants(process.pid)) == 3, 10)
            assert client.models.list().data
        workers = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not any(map(is_alive, workers))


def test_ctrl_c_lets_the_workers_finish(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    """A terminal sends its signal to the whole process group."""
    names = names_for(stores, alpha, GATEWAY_WORKERS="2")
    key = make_key(tmp_path, names)
    alpha.healthy.pieces, alpha.healthy.pause_s = 10, 0.1
    with serving(tmp_path, names, new_group=True) as (process, url, _):
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.stream("POST", f"{url}/api/chat", json=CHATS[1].body, headers=headers, timeout=20) as stream:
            pieces = stream.iter_lines()
            next(pieces)
            os.killpg(process.pid, signal.SIGINT)
            assert json.loads(list(pieces)[-1])["done"] is True
        assert process.wait(10) == 0


def test_killing_the_supervisor_ends_its_workers(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    with serving(tmp_path, names_for(stores, alpha, GATEWAY_WORKERS="2")) as (process, _, log):
        until(lambda: log.read_text().count("keys: argon2id") == 2, 20)
        workers = descendants(process.pid)
        process.kill()
        process.wait(5)
        until(lambda: not any(map(is_alive, workers)), 10)


def test_it_starts_and_stops_cleanly_while_postgresql_is_down(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    names = names_for(stores, alpha) | {"DATABASE_URL": "postgresql://gateway:long-enough-secret@127.0.0.1:1/gateway"}
    with serving(tmp_path, names) as (process, url, _):
        assert httpx.get(f"{url}/readyz").json()["database"] == "away"
        key = "nz_aaaaaaaa_" + "a" * 38
        assert httpx.get(f"{url}/api/tags", headers={"x-api-key": key}).status_code == 401
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_errors_for_a_taken_port_and_a_missing_database_give_advice(tmp_path: Path, stores: TestStores) -> None:
    port = free_port()
    names = {"DATABASE_URL": stores.database_url, "REDIS_URL": stores.redis_url, "GATEWAY_BIND_PORT": str(port)}
    command = [sys.executable, "-m", "gateway", "serve"]
    with socket.create_server(("0.0.0.0", port)):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(names), capture_output=True, text=True, timeout=20, check=False
        )
    assert done.returncode == 1 and f"cannot listen on 0.0.0.0:{port}" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(command, cwd=tmp_path, env=environment({}), capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "DATABASE_URL must be set" in done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A project folder of its own for a local run; as root its data stand elsewhere and are removed after."""
    yield tmp_path
    if os.getuid() == 0:
        from shutil import rmtree

        from gateway.ops.local import stores as local_stores

        for folder in (tmp_path, tmp_path / "one", tmp_path / "two"):
            rmtree(local_stores.data_folder(folder), ignore_errors=True)


def printed(log: Path) -> tuple[str, str]:
    """The key and the curl command that the run printed."""
    text = log.read_text()
    key = re.search(r"key\s+(nz_\w+)", text)
    command = re.search(r"^curl .*$", text, re.MULTILINE)
    assert key and command, text
    return key[1], command[0]


@pytest.mark.long(seconds=24)
def test_the_local_run_from_nothing_to_a_streamed_answer(home: Path) -> None:
    if answers("http://127.0.0.1:11434/api/version"):
        pytest.skip("an Ollama of this machine answers, so no demonstration backend starts")
    with serving(home, {}, "run") as (process, url, log):
        until(lambda: "Ctrl-C" in log.read_text(), 30)
        key, command = printed(log)
        assert url in log.read_text() and "demonstration-no-real-model" in log.read_text()
        assert "a demonstration, not a real model" in log.read_text() and '"model":"demonstration-no-real-model' in command
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout.count("data: ") > 5 and "data: [DONE]" in done.stdout and "demonstration" in done.stdout
        probe = [sys.executable, "-m", "gateway", "probe"]
        subprocess.run(probe, cwd=home, env=environment({}), capture_output=True, timeout=30, check=True)
        second = make_key(home, {})
        assert httpx.get(f"{url}/v1/models", headers={"x-api-key": second}).status_code == 200
        servers = descendants(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert (
            "Traceback" not in log.read_text()
            and f"\nexport OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}\n" in log.read_text()
            and f"\nexport ANTHROPIC_BASE_URL={url} ANTHROPIC_AUTH_TOKEN={key}\n" in log.read_text()
        )
    until(lambda: not any(map(is_alive, servers)), 5)
    assert make_key(home, {}), "keys are made with nothing running, too"
    began = time.monotonic()
    with serving(home, {}, "run") as (process, url, log):
        warm_start_s = time.monotonic() - began
        until(lambda: "Ctrl-C" in log.read_text(), 30)
        assert "shown only once" not in log.read_text()
        assert httpx.get(f"{url}/v1/models", headers={"x-api-key": key}).status_code == 200
        started = descendants(process.pid)
        process.kill()
        process.wait(5)
    until(lambda: not any(map(is_alive, started)), 10)
    assert warm_start_s < 30


@pytest.mark.long(seconds=10)
def test_a_key_may_be_created_before_the_first_run(home: Path, alpha: FakeBackend) -> None:
    key = make_key(home, {})
    with serving(home, {"OLLAMA_BASE_URL": alpha.url}, "run") as (_, url, log):
        until(lambda: "Ctrl-C" in log.read_text(), 30)
        assert "shown only once" not in log.read_text()
        assert httpx.get(f"{url}/api/tags", headers={"x-api-key": key}).status_code == 200
        # One person's machine: photos pass, an agent's long answers are not cut, and its turns not ended.
        printed = re.findall(r"[A-Z_]{8,}=\d+", log.read_text())
        assert printed == [f"{name}={value}" for name, value in installation.LIMITS_OF_RUN.items()]
        body = {**CHATS[2].body, "user": "x" * 2_000_000, "max_tokens": 32_000}
        got = httpx.post(f"{url}{CHATS[2].path}", json=body, headers={"x-api-key": key})
        assert got.status_code == 200 and "x-gateway-max-tokens" not in got.headers
        assert int(got.headers["x-ratelimit-limit-tokens"]) >= 10**7
        shown = subprocess.run(
            [sys.executable, "-m", "gateway", "config", "--json"],
            cwd=home,
            env=environment({}),
            capture_output=True,
            check=True,
        )
        found = {row["name"]: (row["value"], row["from"]) for row in json.loads(shown.stdout)}
        assert {name: found[name] for name in installation.LIMITS_OF_RUN} == {
            name: (value, "local run") for name, value in installation.LIMITS_OF_RUN.items()
        }


def test_the_local_run_uses_an_ollama_that_is_configured(home: Path, alpha: FakeBackend) -> None:
    names = {"OLLAMA_BASE_URL": alpha.url, "GATEWAY_WORKERS": "2", "DEFAULT_RPM": "7"}
    with serving(home, names, "run") as (_, url, log):
        until(lambda: "Ctrl-C" in log.read_text(), 30)
        key, _ = printed(log)
        until(lambda: answers(f"{url}/readyz"), 10)
        got = httpx.post(f"{url}/api/chat", json=CHATS[0].body, headers={"x-api-key": key})
        assert got.json()["message"]["content"] == "alpha heard: Say hi"
        assert "demonstration" not in log.read_text()
        # What the operator says wins, and reaches the workers as the rest does.
        assert "DEFAULT_RPM" not in log.read_text() and "DEFAULT_TPM" in log.read_text()
        assert got.headers["x-ratelimit-limit-requests"] == "7"
        assert got.headers["x-ratelimit-limit-tokens"] == installation.LIMITS_OF_RUN["DEFAULT_TPM"]


def start_messages(folder: Path, names: dict[str, str], when_it_serves: Callable[[], object] = lambda: None) -> str:
    with serving(folder, names, "run") as (_, _, log):
        when_it_serves()
        until(lambda: "Ctrl-C" in log.read_text(), 30)
        return log.read_text()


def test_the_banner_waits_for_the_first_models(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    """A backend that starts beside the gateway answers later than the gateway listens."""
    is_there = threading.Event()
    alpha.play("/api/tags", lambda request: [Hold(is_there), *alpha.healthy(request)])
    printed = start_messages(tmp_path, names_for(stores, alpha), is_there.set)
    assert f"backend   alpha at {alpha.url}: llama3.2:latest\n" in printed and '"model":"llama3.2:latest"' in printed
    assert "  try it:\n" in printed


def test_a_run_that_cannot_listen_creates_no_key(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    names, command = names_for(stores, alpha), [sys.executable, "-m", "gateway", "run"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = {"GATEWAY_BIND_HOST": "127.0.0.1", "GATEWAY_BIND_PORT": str(taken.getsockname()[1])}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment({**names, **where}), capture_output=True, text=True, timeout=30, check=False
        )
    assert done.returncode == 1 and "cannot listen on 127.0.0.1:" in done.stderr
    assert re.search(r"key +nz_\w+  \(shown only once\)", start_messages(tmp_path, names))


def test_the_banner_gives_advice_without_a_model(stores: TestStores, alpha: FakeBackend, tmp_path: Path) -> None:
    alpha.models.clear()
    printed = start_messages(tmp_path, names_for(stores, alpha))
    assert f"backend   alpha at {alpha.url}: no model yet\n" in printed and "`make refresh` polls again" in printed
    alpha.stop()
    with stores.client() as redis:
        redis.flushall()
    printed = start_messages(tmp_path, names_for(stores, alpha))
    assert "DOWN (" in printed and "`make probe` shows what is wrong" in printed


@pytest.mark.long(seconds=10)
def test_two_local_runs_in_two_folders_run_side_by_side(home: Path, alpha: FakeBackend) -> None:
    (home / "one").mkdir()
    (home / "two").mkdir()
    names = {"OLLAMA_BASE_URL": alpha.url}
    with serving(home / "one", names, "run") as (_, first, _), serving(home / "two", names, "run") as (_, second, _):
        assert answers(f"{first}/readyz") and answers(f"{second}/readyz")


def test_a_rule_that_has_nothing_to_choose_is_logged_at_the_start(
    start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    for tiers, expected in (((1, 2), True), ((1, 1), False)):
        entries = [entry_of(backend, tier=tier) for backend, tier in zip((alpha, beta), tiers, strict=True)]
        gateway = start_gateway(*entries, ROUTING="fast", QUEUE_SIZE="7")
        lines = [record.getMessage() for record in gateway.logged.records if record.name == "gateway"]
        assert "routing: fast; calls that find no slot wait, at most 7 of them for a model, each for 300 s" in lines
        assert any("ROUTING=fast chooses nothing" in line for line in lines) == expected
