"""Estimates are corrected by how earlier ones have turned out."""

import pytest

from gateway.fleet.eta import MOST_GROUPS, EtaCorrection

WAITED, AT_ONCE = ("m", True), ("m", False)


def test_a_steady_error_is_corrected_for_calls_of_the_same_kind_only() -> None:
    eta = EtaCorrection()
    assert eta.corrected(WAITED, 4.0) == 4.0
    for _ in range(60):
        eta.note(WAITED, 2.0, 3.0)
    assert eta.corrected(WAITED, 4.0) == pytest.approx(6.0, rel=0.01)
    assert eta.corrected(AT_ONCE, 4.0) == 4.0


def test_one_outlier_changes_little_and_what_is_remembered_is_bounded() -> None:
    eta = EtaCorrection()
    for _ in range(60):
        eta.note(WAITED, 2.0, 2.0)
    eta.note(WAITED, 2.0, 2000.0)
    assert eta.corrected(WAITED, 1.0) < 1.3
    eta.note(AT_ONCE, 0.0, 5.0)
    assert eta.corrected(AT_ONCE, 1.0) == 1.0
    for number in range(MOST_GROUPS + 5):
        eta.note((f"m{number}", True), 1.0, 2.0)
    assert eta.corrected(("m0", True), 1.0) == 1.0
