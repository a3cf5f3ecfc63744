"""The mock backend and the load generator, built from C, and the choice of cores."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SUBJECT_CORE, OTHER_CORE = 1, 0
# As this process found it: it moves to one of them later.
CORES = os.sched_getaffinity(0)
# Of a core, in a round: more than this taken by others, and the round is no measurement.
DISTURBED_PERCENT = 5.0


class CannotMeasure(Exception):
    """The message says what is missing and what to do."""


@dataclass(frozen=True)
class Tools:
    mock: str
    loadgen: str


def build(folder: Path) -> Tools:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise CannotMeasure("no C compiler: install gcc or clang, the mock backend and the load generator are in C")
    for name in ("mock", "loadgen"):
        command = [compiler, "-O2", "-w", "-o", str(folder / name), str(HERE / f"{name}.c"), "-lm"]
        subprocess.run(command, check=True)
    return Tools(str(folder / "mock"), str(folder / "loadgen"))


def pinned(core: int, command: Sequence[str]) -> list[str]:
    """On one core where there are two; else what is measured and what measures share."""
    able = shutil.which("taskset") and {SUBJECT_CORE, OTHER_CORE} <= CORES
    return ["taskset", "-c", str(core), *command] if able else list(command)


def stay_off_the_subjects_core() -> bool:
    """For this process and all its children, with the stores."""
    if not {SUBJECT_CORE, OTHER_CORE} <= CORES:
        return False
    os.sched_setaffinity(0, {OTHER_CORE})
    return True


def load(tools: Tools, port: int, key: str, pids: Sequence[int], *options: str) -> dict[str, Any]:
    """One run of the load generator: its JSON output, with times in microseconds. `ps` must not show the key."""
    watched = ["-P", ",".join(map(str, pids))] if pids else []
    keys = ["-k", "/dev/stdin"] if key else []
    command = pinned(OTHER_CORE, [tools.loadgen, "-u", f"127.0.0.1:{port}", *keys, *watched, *options])
    done = subprocess.run(command, input=f"{key}\n", capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise CannotMeasure(f"the load generator failed: {done.stderr[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    found["complaint"] = done.stderr.strip()
    return found


def is_disturbed(found: dict[str, Any]) -> bool:
    return bool(max(found["steal0"], found["steal1"]) > DISTURBED_PERCENT)


def memory_mib(pids: Sequence[int]) -> float:
    def of(pid: int) -> float:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        return 0.0

    return sum(of(pid) for pid in pids)
