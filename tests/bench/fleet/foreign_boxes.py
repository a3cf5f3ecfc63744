"""The machines of a scenario, simulated by another program: `PROGRAM PORT --models … --vram … --speed …`, one process each."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from tests.bench.fleet.scenario import BoxConfig, Scenario
from tests.support.processes import answers, environment, free_port, until

STARTS_S, STOPS_S = 20.0, 10.0
OPTIONS = ("vram", "slots", "queue", "prefill", "decode", "disk")


@contextmanager
def serving(program: str, found: Scenario, speed: float, base_port: int) -> Iterator[list[str]]:
    ports = [base_port + number if base_port else free_port() for number in range(len(found.boxes))]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with ExitStack() as stack:
        for box, port in zip(found.boxes, ports, strict=True):
            command = [sys.executable, program, str(port), *options(box), "--speed", str(speed)]
            process = subprocess.Popen(command, env=environment({}), stdin=subprocess.DEVNULL)
            stack.callback(end, process)
        for url in urls:
            until(partial(answers, url), STARTS_S)
        yield urls


def options(box: BoxConfig) -> list[str]:
    models = ",".join(f"{name}={gigabytes:g}" for name, gigabytes in box.models.items())
    numbers = (word for name in OPTIONS for word in (f"--{name}", f"{getattr(box, name):g}"))
    return ["--models", models, *numbers]


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait(STOPS_S)
