"""Whatever is killed while many calls wait: no place has more calls than slots, no machine two loads, nothing is left.

`python -m tests.bench.fleet.chaos` does it for longer, also to whole gateways, and checks the rows of killed calls.
"""

from pathlib import Path

import pytest

from tests.bench.fleet.chaos.__main__ import table
from tests.bench.fleet.chaos.run import Plan, run


@pytest.mark.long(seconds=25)
def test_kills_break_no_promise(tmp_path: Path) -> None:
    plan = Plan(
        9,
        at_once=16,
        settled_s=2.0,
        pause_s=(0.5, 1.5),
        longest_stop_s=1.0,
        acts=("worker", "box", "redis", "box"),
        of_killed=False,
        speed=15.0,
    )
    findings, events = run(plan, tmp_path)
    assert not findings.violations, table(findings, events)
    assert findings.figures["calls that waited"] > 5, "there is something to do"
