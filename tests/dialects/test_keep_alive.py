"""How long a model stays loaded, as Ollama takes it (api/types.go, Go's time.ParseDuration)."""

import math

import pytest

from gateway.dialects.keep_alive import keep_alive_s


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        (300, 300.0),
        (1.5, 1.5),
        (-1, math.inf),
        ("0", 0.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1.5h", 5400.0),
        (".5s", 0.5),
        ("2.s", 2.0),
        ("100ms", 0.1),
        ("+3s", 3.0),
        ("-1m", math.inf),
        ("-0s", 0.0),
        ("3us2µs", 5e-6),
    ],
)
def test_what_ollama_takes_has_its_seconds(written: object, seconds: float) -> None:
    assert keep_alive_s(written) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "5",
        "-1",
        "5 m",
        "m",
        ".s",
        "5m ",
        "5d",
        "1e3s",
        "٣s",
        "9" * 20 + "h",
        "1s" * 40,
        math.nan,
        math.inf,
        1e300,
        True,
        None,
        [],
    ],
)
def test_what_ollama_refuses_is_none(wrong: object) -> None:
    assert keep_alive_s(wrong) is None
