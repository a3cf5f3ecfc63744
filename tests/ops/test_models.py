"""The verbs for a model on backends: warm, unload, pull."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.ops.cli import progress
from tests.conftest import StartGateway
from tests.support.fake_backend.answers import SIZE
from tests.support.fake_backend.backend import FakeBackend
from tests.support.fake_backend.memory import Memory
from tests.support.fake_backend.scripts import NDJSON, Forever, answer, ndjson, stream
from tests.support.operator import Operator
from tests.support.processes import environment, until

MODEL = "llama3.2:latest"


@pytest.fixture
def boxes(operator: Operator, alpha: FakeBackend, beta: FakeBackend) -> Iterator[tuple[Memory, Memory]]:
    alpha.healthy.memory, beta.healthy.memory = Memory(), Memory()
    operator.with_backends(alpha, beta)
    yield alpha.healthy.memory, beta.healthy.memory


def test_a_model_is_loaded_and_unloaded(operator: Operator, boxes: tuple[Memory, Memory]) -> None:
    boxes[0].load_s = 0.3
    done = operator.types("warm", "--model", "llama3.2")
    assert (done.returncode, boxes[0].loaded, boxes[1].loaded) == (0, {MODEL}, set())
    header, row = done.stdout.splitlines()
    assert header.split() == ["BACKEND", "MODEL", "STATE", "DETAIL", "LOAD", "S"]
    assert row.split()[:4] == ["alpha", MODEL, "done", "loaded"] and float(row.split()[4]) >= 0.25
    assert f"alpha  {MODEL}  loading  (0 s)" in done.stderr
    [other] = operator.gets_json("warm", "--model", MODEL, "--backend", "beta").rows
    assert (other["backend"], boxes[1].loaded) == ("beta", {MODEL})
    printed = operator.gets("unload", "--model", MODEL)
    assert [line.split() for line in printed.splitlines()[1:]] == [
        ["alpha", MODEL, "done", "unloaded", "2.0", "GB"],
        ["beta", MODEL, "done", "unloaded", "2.0", "GB"],
    ]
    [other] = operator.gets_json("unload", "--model", MODEL, "--backend", "beta").rows
    assert (other["detail"], other["freed_bytes"]) == ("was not loaded", 0)


def test_a_drained_backend_is_not_loaded(operator: Operator, boxes: tuple[Memory, Memory], alpha: FakeBackend) -> None:
    operator.gets("drain", "--backend", "alpha")
    assert "alpha is drained: `make undrain BACKEND=alpha`" in operator.is_refused(
        "warm", "--model", MODEL, "--backend", "alpha"
    )
    assert operator.gets_json("warm", "--model", MODEL).rows[0]["backend"] == "beta"
    # It may be prepared for its return.
    assert operator.gets_json("unload", "--model", MODEL, "--backend", "alpha").rows[0]["state"] == "done"
    assert [row.split()[2] for row in operator.gets("pull", "--model", "new").splitlines()[1:]] == ["done", "done"]


def test_what_cannot_begin_is_refused(operator: Operator, boxes: tuple[Memory, Memory]) -> None:
    assert "no backend has the model 'nobody'" in operator.is_refused("warm", "--model", "nobody")
    assert "there is no backend 'omega'" in operator.is_refused("pull", "--model", "x", "--backends", "alpha,omega")
    assert "MODEL= (--model)" in operator.is_refused("unload", code=2)


def test_a_model_is_pulled_on_all_boxes(
    operator: Operator, start_gateway: StartGateway, alpha: FakeBackend, beta: FakeBackend
) -> None:
    gateway = start_gateway(alpha, beta, MODEL_DISCOVERY_REFRESH_S="600")
    operator.with_backends(alpha, beta)
    done = operator.types("pull", "--model", "qwen3:8b")
    assert done.returncode == 0
    assert [line.split()[:6] for line in done.stdout.splitlines()[1:]] == [
        ["alpha", "qwen3:8b", "done", "pulled", "2.0", "GB"],
        ["beta", "qwen3:8b", "done", "pulled", "2.0", "GB"],
    ]
    until(lambda: "qwen3:8b" in gateway.components.discovery.catalog.models, 2)
    assert len(gateway.components.discovery.catalog.models["qwen3:8b"].offers) == 2


def test_one_box_that_fails_is_seen_and_ends_no_other(operator: Operator, alpha: FakeBackend, beta: FakeBackend) -> None:
    alpha.play("/api/pull", answer(500, {"error": "no space left on device"}))
    operator.with_backends(alpha, beta)
    done = operator.types("pull", "--model", "qwen3", "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    last: dict[str, Any] = {row["backend"]: row for row in rows}
    assert (last["alpha"]["state"], last["alpha"]["detail"]) == ("failed", "no space left on device")
    assert (last["beta"]["state"], last["beta"]["percent"]) == ("done", 100.0)
    assert (done.returncode, done.stderr) == (1, "error: failed on alpha\n")
    assert "alpha  qwen3  FAILED: no space left on device" in operator.types("pull", "--model", "qwen3").stderr


def test_ctrl_c_ends_the_pulls(operator: Operator, alpha: FakeBackend) -> None:
    record = {"status": "pulling aa", "digest": "sha256:aa", "total": 4, "completed": 1}
    alpha.play("/api/pull", [*stream(ndjson([record]), NDJSON)[:-1], Forever()])
    operator.with_backends(alpha)
    command = [sys.executable, "-m", "gateway", "pull", "--model", "qwen3"]
    with subprocess.Popen(
        command, cwd=operator.folder, env=environment(operator.names), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while "25.0 %" not in line:
            line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(10) == 130
    assert "the connections are closed, so Ollama ends its pulls" in rest and "Traceback" not in rest
    assert alpha.wait_idle() and alpha.calls("/api/pull")[0].outcome == "client_left"


def row_of(**more: Any) -> dict[str, Any]:
    sizes = {"percent": 41.25, "completed_bytes": 4_125_000_000, "total_bytes": 10_000_000_000}
    speed = {"bytes_per_s": 85_000_000, "eta_s": 69.1}
    running = {"backend": "alpha", "model": "qwen3", "state": "running", "detail": "pulling 8eeb52dfb3bb", "seconds": 48.2}
    return {**running, **sizes, **speed, **more}


def test_progress_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    lines = progress.LinesInPlace()
    lines.show([row_of(), row_of(backend="b", detail="\x1b[2J")])
    lines.show([row_of(state="done", detail="pulled"), row_of(backend="b", state="failed", detail="no space left")])
    first, second, third, fourth, end = capsys.readouterr().err.split("\n")
    assert first == "\ralpha  qwen3  pulling 8eeb52dfb3bb   41.2 %  4.1 GB of 10.0 G"[:60] + "\x1b[K"
    assert second.startswith("b      qwen3  ?[2J")
    assert third == "\x1b[A\x1b[A\ralpha  qwen3  pulled\x1b[K"
    assert (fourth, end) == ("b      qwen3  FAILED: no space left\x1b[K", "")


def test_progress_fits_a_low_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LINES", "5")
    progress.LinesInPlace().show([row_of(backend=f"box{n}") for n in range(9)])
    *lines, end = capsys.readouterr().err.split("\n")
    assert len(lines) == 4 and not end and lines[-1].startswith("… and 6 more")


def test_progress_in_words() -> None:
    assert progress.in_words(row_of()) == (
        "alpha  qwen3  pulling 8eeb52dfb3bb   41.2 %  4.1 GB of 10.0 GB  85.0 MB/s  69 s left  (48 s)"
    )
    assert progress.in_words(row_of(bytes_per_s=None, eta_s=None, seconds=4000)).endswith("of 10.0 GB  (66 min)")
    loading = {"backend": "a", "model": "m", "state": "running", "detail": "loading", "seconds": 3.2, "load_s": None}
    assert progress.in_words({**loading, "expected_s": 12.4}) == "a  m  loading  (3 s of about 12 s)"
    assert progress.in_words({**loading, "expected_s": None}) == "a  m  loading  (3 s)"
    assert [progress.size(count) for count in (None, 0, 999, 25_000, SIZE)] == ["-", "0 B", "999 B", "25.0 kB", "2.0 GB"]
    assert [progress.duration(seconds) for seconds in (0.4, 99, 130, 9000)] == ["0 s", "99 s", "2 min", "2 h 30 min"]


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = progress.PlainLines()
    for percent in range(50):
        lines.show([row_of(percent=percent)])
    assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    lines.show([row_of()])
    assert len(capsys.readouterr().err.splitlines()) == 1
