"""The command line as a whole: wrong arguments and settings, and output that nobody reads."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.operator import Operator
from tests.support.processes import environment


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["key"], "--name"),
        (["key", "--name", "a", "--expires", "soon"], "write 90s, 15m, 24h, 30d or 2w"),
        (["key", "--name", "a", "--expires", "0"], "a key must be valid for some time"),
        (["key", "--name", "a", "--expires", "999999w"], "at most 36500d"),
        (["key", "--name", "a", "--rpm", "-1"], "rpm"),
        (["key", "--name", "a", "--tpm", "100k"], "write a whole number"),
        (["rotate", "--key", "a", "--overlap", "-1h"], "overlap"),
        (["rotate"], "--key"),
        (["revoke", "name"], "--key"),
        (["frobnicate"], "invalid choice"),
        ([], "VERB"),
    ],
)
def test_arguments_that_cannot_be_read(operator: Operator, words: list[str], advice: str) -> None:
    assert advice in operator.is_refused(*words, code=2)


@pytest.mark.parametrize("words", [["keys"], ["config"], ["probe"], ["psql"], ["health"], ["serve"]])
def test_a_wrong_setting_stops_every_command(operator: Operator, words: list[str]) -> None:
    line = operator.is_refused(*words, code=2, DEFAULT_RPM="many")
    assert line == "error: DEFAULT_RPM must be an integer from 0 to 1000000000, not 'many'\n"


def test_a_closed_pipe_is_not_an_error(operator: Operator) -> None:
    command = f"{sys.executable} -m gateway config | head -0"
    done = subprocess.run(
        command, shell=True, cwd=operator.folder, env=environment(operator.names), capture_output=True, text=True, check=False
    )
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_output_that_cannot_be_written_is_reported() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "gateway", "config", "--json"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 1 and b"cannot be written" in done.stderr and b"Traceback" not in done.stderr
