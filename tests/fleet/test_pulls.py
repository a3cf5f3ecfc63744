"""What Ollama reports of a pull, as numbers: percent, bytes, speed, the seconds left."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.fleet import pulls
from gateway.fleet.pulls import PullRefused, Transfer


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def line(**record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


def test_layers_are_summed_and_the_speed_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    transfer = Transfer(clock)
    assert transfer.feed(line(status="pulling manifest"))
    assert transfer.facts["percent"] is None and transfer.facts["eta_s"] is None
    transfer.feed(line(status="pulling a", digest="sha256:a", total=1000, completed=400))
    # These were there before: they say nothing of the speed.
    assert transfer.facts["bytes_per_s"] is None and transfer.facts["percent"] == 40.0
    for second in range(1, 21):
        clock.now = 100.0 + second
        there = 400 + (2 * second if second <= 10 else 20 + 20 * (second - 10))
        assert transfer.feed(line(status="pulling a", digest="sha256:a", total=1000, completed=there))
    facts = transfer.facts
    assert (facts["completed_bytes"], facts["total_bytes"], facts["percent"]) == (620, 1000, 62.0)
    assert facts["bytes_per_s"] == 20 and facts["eta_s"] == 19.0
    transfer.feed(line(status="pulling b", digest="sha256:b", total=500, completed=500))
    assert (transfer.facts["completed_bytes"], transfer.facts["total_bytes"]) == (1120, 1500)
    assert not transfer.has_succeeded
    transfer.feed(line(status="success"))
    assert transfer.has_succeeded


def test_a_report_that_repeats_itself_is_no_progress() -> None:
    transfer = Transfer(Clock())
    report = line(status="pulling a", digest="sha256:a", total=1000, completed=400)
    assert [transfer.feed(report), transfer.feed(report), transfer.feed(b""), transfer.feed(b"\n")] == [
        True,
        False,
        False,
        False,
    ]


def test_a_record_may_come_in_pieces() -> None:
    transfer = Transfer(Clock())
    whole = line(status="pulling manifest") + line(status="success")
    assert [transfer.feed(whole[n : n + 1]) for n in range(len(whole))].count(True) == 2


@pytest.mark.parametrize("record", [{"error": "no space left"}, {"error": {"message": "no space left"}}])
def test_an_error_ends_it(record: dict[str, Any]) -> None:
    with pytest.raises(PullRefused, match="no space left"):
        Transfer(Clock()).feed(line(status="pulling manifest") + line(**record))


def test_an_endless_line_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls, "LONGEST_RECORD", 100)
    with pytest.raises(PullRefused, match="no list of records"):
        Transfer(Clock()).feed(b"x" * 101)


VALUES: Any = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
)
RECORDS = st.dictionaries(st.sampled_from(["status", "digest", "total", "completed", "x"]), VALUES)


@given(st.lists(RECORDS | VALUES, max_size=8))
def test_any_records_give_numbers_that_can_be_shown(records: list[Any]) -> None:
    transfer = Transfer(Clock())
    for record in records:
        transfer.feed(json.dumps(record).encode() + b"\n")
    facts = transfer.facts
    assert 0 <= facts["completed_bytes"] <= facts["total_bytes"]
    assert facts["percent"] is None or 0 <= facts["percent"] <= 100
    json.dumps(facts, allow_nan=False)
