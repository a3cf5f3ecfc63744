"""`python -m tests.bench`: builds and starts everything, measures in turn, prints a table, and writes JSON and a plot."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.bench import report, scenarios, subjects, tools

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description="The gateway against plain passthroughs and nginx.")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured, in turn (3)")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for results.json and results.svg")
    parser.add_argument("--litellm", default="", metavar="PYTHON", help="the python of an environment with litellm[proxy]")
    arguments = parser.parse_args()
    began = time.monotonic()
    progress = lambda words: print(f"{time.monotonic() - began:5.0f} s  {words}", file=sys.stderr, flush=True)  # noqa: E731
    try:
        with tempfile.TemporaryDirectory(prefix="nz-bench-") as folder:
            results = measure(Path(folder), arguments, progress)
    except tools.CannotMeasure as missing:
        print(f"cannot measure: {missing}", file=sys.stderr)
        return 1
    report.write(results, arguments.out)
    print(report.table(results), "", report.goals_table(results), sep="\n")
    print(f"\n{results.dropped} rounds dropped because others used the cores. Raw figures: {arguments.out / 'results.json'}")
    return 0


def measure(folder: Path, arguments: argparse.Namespace, progress: scenarios.Progress) -> scenarios.Results:
    folder.chmod(0o711)
    progress("building the mock backend and the load generator")
    built = tools.build(folder)
    if not tools.stay_off_the_subjects_core():
        progress("one core only: what measures and what is measured share it, the figures say little")
    progress("starting everything, the stores take some seconds")
    with subjects.all_of_them(built, folder, arguments.litellm) as (found, direct):
        own = scenarios.measure_gateway(built, found[0], direct, folder, progress)
        results = scenarios.compare(built, found, direct, arguments.rounds, progress)
    results.own = own
    return results


if __name__ == "__main__":
    sys.exit(main())
