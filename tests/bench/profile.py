"""`python -m tests.bench.profile`: where the time of a request and of a chunk goes, by area and by function."""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.bench import areas, report, subjects, tools
from tests.bench.profiled import CALLS, COSTS
from tests.support.processes import until

SHOWN = 25


class Kind(NamedTuple):
    """A measurement: the options of the load generator, and the field of its output with the events per second."""

    event: str
    options: Sequence[str]
    rate: str


LOAD_S = 5
WHOLE = Kind("request", ("-c", "32"), "rps")
STREAM = Kind("chunk", ("-s", "-n", "100", "-D", "20", "-c", "200"), "chunks_s")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make profile", description="Where the time of a request and of a chunk goes.")
    parser.add_argument("--functions", type=int, default=SHOWN, help=f"how many functions to list ({SHOWN})")
    arguments = parser.parse_args()
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="nz-profile-") as folder:
            for kind in (WHOLE, STREAM):
                waiting = f"a {kind.event}: starting everything, then {LOAD_S} s of load"
                print(f"{time.monotonic() - began:5.0f} s  {waiting}", file=sys.stderr, flush=True)
                place = Path(folder) / kind.event
                place.mkdir(mode=0o711)
                show(kind, *measure(kind, place), arguments.functions)
    except tools.CannotMeasure as missing:
        print(f"cannot measure: {missing}", file=sys.stderr)
        return 1
    print("A profiler slows calls down, those of small functions most: read shares and counts, not microseconds.")
    return 0


def measure(kind: Kind, folder: Path) -> tuple[areas.Account, float]:
    folder.chmod(0o711)
    folder.parent.chmod(0o711)
    built = tools.build(folder)
    entry = ("-m", "tests.bench.profiled", str(folder))
    with subjects.mock(built, folder) as mock_port, subjects.gateway(mock_port, folder, entry) as gateway:
        tools.load(built, gateway.port, gateway.key, [], "-c", "8", "-t", "2", "-w", "0")
        with counted(gateway.pids, folder):
            found = tools.load(built, gateway.port, gateway.key, [], *kind.options, "-t", str(LOAD_S), "-w", "0")
    return areas.read(folder / CALLS), max(1.0, float(found[kind.rate]) * LOAD_S)


@contextmanager
def counted(pids: Sequence[int], folder: Path) -> Iterator[None]:
    """Counts calls during the block; afterwards the folder has the results."""
    (folder / COSTS).unlink(missing_ok=True)
    os.kill(min(pids), signal.SIGUSR1)
    yield
    os.kill(min(pids), signal.SIGUSR2)
    until((folder / COSTS).exists, 30)


def show(kind: Kind, account: areas.Account, events: float, most: int) -> None:
    print(f"\nPer {kind.event}, of {events:,.0f}:\n")
    print(
        report.aligned(areas.table(account, events)), "", report.aligned(list(areas.dearest(account, events, most))), sep="\n"
    )
    print()


if __name__ == "__main__":
    sys.exit(main())
