"""`python -m tests.bench.profiled FOLDER serve`: the gateway, with its calls counted from SIGUSR1 to SIGUSR2.

FOLDER then has `calls.pstats` and, written last, `costs.json`: Python objects that only the collector could free, and how
many blocks of memory more are in use.
"""

import cProfile
import gc
import json
import signal
import sys
from pathlib import Path
from types import FrameType

from gateway.ops import main as ops_main

CALLS, COSTS = "calls.pstats", "costs.json"


class Costs:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._profiler = cProfile.Profile()
        self._collected = self._blocks = 0

    def begin(self, number: int, frame: FrameType | None) -> None:
        self._profiler = cProfile.Profile()
        self._collected, self._blocks = collected(), sys.getallocatedblocks()
        self._profiler.enable()

    def end(self, number: int, frame: FrameType | None) -> None:
        self._profiler.disable()
        blocks = sys.getallocatedblocks() - self._blocks
        self._profiler.dump_stats(self._folder / CALLS)
        costs = {"collected": collected() - self._collected, "blocks": blocks}
        unfinished = self._folder / "costs"
        unfinished.write_text(json.dumps(costs))
        unfinished.replace(self._folder / COSTS)


def collected() -> int:
    gc.collect()
    return int(sum(generation["collected"] for generation in gc.get_stats()))


def main() -> int:
    costs = Costs(Path(sys.argv[1]))
    signal.signal(signal.SIGUSR1, costs.begin)
    signal.signal(signal.SIGUSR2, costs.end)
    return ops_main.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
