"""The Makefile's targets pass everything on to the verbs, as it is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import environment
from tests.support.project import PROJECT

PRINT = "import json, sys; print(json.dumps(sys.argv[1:]))"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A folder whose environment is ready, so that `make` only calls the command."""
    shutil.copy(PROJECT / "Makefile", tmp_path)
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "requirements-local.txt").touch()
    (tmp_path / ".venv").mkdir()
    for marker in ("made", "ready-to-run"):
        (tmp_path / ".venv" / marker).touch()
    (tmp_path / "print.py").write_text(PRINT)
    return tmp_path


def make(folder: Path, *words: str, **names: str) -> list[str]:
    """What `python -m gateway` is called with."""
    command = ["make", "-s", *words, f"GATEWAY={sys.executable} print.py"]
    done = subprocess.run(command, cwd=folder, env=environment(names), capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


# As pip is: it tells of every package, with -q of warnings and errors alone.
PIP = """#!/bin/sh
case "$*" in
    *--version*) ;;
    *" -q "*) if [ -e no-room ]; then echo "ERROR: no room" >&2; exit 1; fi ;;
    *) seq 40 ;;
esac
"""


def test_make_installs_in_one_line_and_errors_are_seen(made: Path) -> None:
    (made / "bin").mkdir()
    (made / "bin" / "python").write_text(PIP)
    (made / "bin" / "python").chmod(0o755)
    (made / ".venv" / "ready-to-run").unlink()
    command = ["make", "keys", "BIN=bin", f"GATEWAY={sys.executable} print.py"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=made, env=environment({}), capture_output=True, text=True, timeout=30, check=False)

    (made / "no-room").touch()
    failed = run()
    assert failed.returncode != 0 and "ERROR: no room" in failed.stderr
    (made / "no-room").unlink()
    first, second = run(), run()
    assert first.stdout.splitlines() == ["installing the pinned dependencies (a minute, the first time)", '["keys"]']
    assert (first.stderr, second.stdout) == ("", '["keys"]\n')


@pytest.mark.parametrize(
    "name",
    ["plain", "two words", 'a b"c', "it's", "`id`", "a;id", "a|id>x", "\\n", "*", "ünï", "--rpm", "a#b", "", "%s", "~", "a\\"],
)
def test_make_passes_names_on_as_they_are(made: Path, name: str) -> None:
    assert make(made, "key", f"NAME={name}") == (["key", "--name", name] if name else ["key"])


def test_make_passes_dollar_signs_on(made: Path) -> None:
    # As in every makefile, a dollar is written twice.
    assert make(made, "key", 'NAME=a b"c$$d') == ["key", "--name", 'a b"c$d']
    assert make(made, "key", "NAME=$$(id)") == ["key", "--name", "$(id)"]
    assert make(made, "key", "NAME=$${HOME}") == ["key", "--name", "${HOME}"]


def test_make_passes_everything_on(made: Path) -> None:
    words = [
        "NAME=n",
        "MODELS=a b*",
        "EXPIRES=30d",
        "RPM=1",
        "TPM=2",
        "CONCURRENT=3",
        "ADMIN_MODELS=1",
        "SHOW_BACKEND=1",
        "JSON=1",
    ]
    assert make(made, "key", *words) == [
        *("key", "--name", "n", "--models", "a b*", "--expires", "30d", "--rpm", "1", "--tpm", "2", "--concurrent", "3"),
        *("--admin-models", "--show-backend", "--json"),
    ]
    assert make(made, "rotate", "KEY=my key", "OVERLAP=1h") == ["rotate", "--key", "my key", "--overlap", "1h"]
    assert make(made, "revoke", "KEY=my key") == ["revoke", "--key", "my key"]
    assert make(made, "keys", "JSON=0") == ["keys"]


def test_make_passes_the_audits_filters_on(made: Path) -> None:
    filters = ["KEY=a b", "MODEL=a*", "SINCE=7d", "STATUS=4xx", "OUTCOME=refused", "LIMIT=5", "CSV=1"]
    assert make(made, "audit", *filters) == [
        *("audit", "--key", "a b", "--model", "a*", "--since", "7d", "--status", "4xx", "--outcome", "refused", "--limit", "5"),
        "--csv",
    ]
    assert make(made, "usage", "BY=day,key", "SINCE=1d", "JSON=1") == ["usage", "--by", "day,key", "--since", "1d", "--json"]
    assert make(made, "forget", "KEY=a") == ["forget", "--key", "a"]


def test_make_passes_models_and_backends_on(made: Path) -> None:
    for verb in ("warm", "unload"):
        assert make(made, verb, "MODEL=a b:7b", "BACKEND=alpha") == [verb, "--model", "a b:7b", "--backend", "alpha"]
    pull = ["pull", "--model", "qwen3", "--backends", "alpha,beta", "--json"]
    assert make(made, "pull", "MODEL=qwen3", "BACKENDS=alpha,beta", "JSON=1") == pull


def test_make_variables_are_not_taken_from_the_environment(made: Path) -> None:
    names = {"NAME": "of the machine", "MODELS": "x", "JSON": "1", "ADMIN_MODELS": "1", "RPM": "1"}
    assert make(made, "key", "NAME=mine", **names) == ["key", "--name", "mine"]
    assert make(made, "key", **names) == ["key"]
    assert make(made, "revoke", KEY="of the environment") == ["revoke"]


@pytest.mark.parametrize(
    "verb", ["keys", "models", "refresh", "probe", "audit", "usage", "audit-verify", "purge", "migrate", "config", "psql"]
)
def test_each_target_calls_its_verb(made: Path, verb: str) -> None:
    assert make(made, verb) == [verb]


@pytest.mark.parametrize("verb", [["key", "NAME=a"], ["limit", "KEY=a"]])
def test_make_refuses_variables_that_it_does_not_know(verb: list[str]) -> None:
    def make_with(given: str) -> subprocess.CompletedProcess[str]:
        # Without what the `make` that runs the tests was given.
        names = environment({})
        return subprocess.run(
            ["make", "-n", *verb, given], cwd=PROJECT, env=names, capture_output=True, text=True, timeout=30, check=False
        )

    wrong, right = make_with("RPMS=5"), make_with("RPM=5")
    assert wrong.returncode and "takes no RPMS" in wrong.stderr and right.returncode == 0 and "--rpm" in right.stdout
