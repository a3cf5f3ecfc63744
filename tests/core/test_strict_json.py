"""The fast parser of clients' JSON is as strict as a slow one, and no body blocks the process for long."""

import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.core import strict_json
from gateway.core.errors import BadRequest

PIECES = (
    (
        '{ } [ ] , : "a" "b" "a:" '
        '"\\\\u003a" "\\\\u003A" "\\\\\\\\" "\\\\"" "," 0 -0 1.5 1e5 1e400 NaN true null -1 "\\\\ud800" "\\\\\\\\u003a" '
        "9223372036854775807 9223372036854775808 -9223372036854775808 0.1234567890123456789012 1234567890123456789e1"
    )
    .replace("\\\\", "\\")
    .split()
)
NUMBERS = st.integers(-(2**65), 2**65) | st.floats(allow_nan=True) | st.booleans() | st.none()
TEXTS = st.text(alphabet='ab:,"\\[{\u00e9', max_size=4)


class Pairs(list[Any]):
    """An object as pairs, so that a key may occur twice."""


VALUES = st.recursive(
    NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(TEXTS, inner), max_size=4).map(Pairs),
    max_leaves=12,
)


def written(value: Any, *, escaped: bool) -> str:
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{written(k, escaped=escaped)}:{written(v, escaped=escaped)}" for k, v in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(written(one, escaped=escaped) for one in value) + "]"
    text = json.dumps(value, ensure_ascii=escaped)
    return text.replace(":", "\\u003a") if escaped and isinstance(value, str) else text


def slowly(body: bytes) -> object:
    """The strict decoder by itself, with every hook."""
    try:
        value = strict_json._decode(body.decode())
    except (ValueError, BadRequest):
        return BadRequest
    return repr(value) if isinstance(value, dict) else BadRequest


def quickly(body: bytes) -> object:
    try:
        return repr(strict_json.read_object(body))
    except BadRequest:
        return BadRequest


@given(VALUES, st.booleans())
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_it_is_as_strict_as_the_slow_decoder(value: Any, escaped: bool) -> None:
    body = f'{{"x": {written(value, escaped=escaped)}}}'.encode()
    assert quickly(body) == slowly(body)


@given(st.lists(st.sampled_from(PIECES), max_size=12))
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_it_is_as_strict_on_text_that_is_nearly_json(pieces: list[str]) -> None:
    for body in ("".join(pieces).encode(), f'{{"x":[{",".join(pieces)}]}}'.encode(), f"{{{':1,'.join(pieces)}:1}}".encode()):
        assert quickly(body) == slowly(body)


def test_duplicates_in_a_large_body_are_refused_without_the_slow_decoder() -> None:
    many = "1," * 20_000
    for rest, message in (
        ('"a":1,"a":2', "twice"),
        ('"a":1,"a":"\\u003a"', "twice"),
        ('"a":9223372036854775808', "out of range"),
        ('"a":NaN', "not valid JSON"),
        ('"a":1e400', "not valid JSON"),
        ('"a":' + "[" * 300 + "]" * 300, "nested too deeply"),
    ):
        with pytest.raises(BadRequest, match=message):
            strict_json.read_object(f'{{"x":[{many}1],{rest}}}'.encode())


def test_valid_bodies_pass() -> None:
    context = list(range(100_000, 200_000))
    code = 'if (a[0], {b: "c"}): \\ "quoted", ' * 20_000
    body = {"context": context, "code": code, "seed": 2**63 - 1, "id": "12345678901234567890123", "twice": "a\\u003a:"}
    for ensure_ascii in (True, False):
        assert strict_json.read_object(json.dumps(body, ensure_ascii=ensure_ascii).encode()) == body


@pytest.mark.parametrize("unit", ["1,", "{},", '{"":1},', '"",', "[],"])
def test_a_body_with_too_many_values_is_refused_before_parsing(unit: str) -> None:
    with pytest.raises(BadRequest, match="more than 300000 values"):
        strict_json.read_object(f'{{"x":[{unit * 700_000}1]}}'.encode())


def test_numbers_are_parsed_much_faster_than_with_hooks() -> None:
    body = b'{"x":[' + b"1," * 100_000 + b"1]}"

    def quickest(read: Any) -> float:
        times = []
        for _ in range(3):
            began = time.process_time()
            read()
            times.append(time.process_time() - began)
        return min(times)

    assert quickest(lambda: strict_json.read_object(body)) < quickest(lambda: strict_json._decode(body.decode())) / 2
