"""The format of keys, and the places in a request where a key is found."""

import base64
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import key_format
from gateway.core.errors import ConflictingKeys, MissingKey

CHARACTERS = st.characters(codec="utf-8")
IN_ANY_KEY = st.sampled_from(sorted(key_format.ALPHABET | {"_"}))


def test_new_keys_have_the_format_and_are_unique() -> None:
    minted = {key_format.mint().whole for _ in range(200)}
    assert len(minted) == 200
    assert all(re.fullmatch(r"nz_[a-z2-7]{8}_[a-z2-7]{38}", whole) for whole in minted)
    assert key_format.SECRET_BYTES * 8 >= 160


def test_a_new_key_can_be_parsed_and_is_not_in_its_repr() -> None:
    minted = key_format.mint()
    assert key_format.parse(minted.whole) == minted
    assert minted.whole not in repr(minted) and minted.secret_id in minted.whole


@given(at=st.integers(0, 48), character=CHARACTERS | IN_ANY_KEY)
def test_the_checksum_refuses_a_changed_character(at: int, character: str) -> None:
    whole = key_format.mint().whole
    changed = whole[:at] + character + whole[at + 1 :]
    assert changed == whole or key_format.parse(changed) is None


@given(at=st.integers(0, 49), text=st.text(CHARACTERS | IN_ANY_KEY, min_size=1, max_size=3))
def test_a_longer_text_is_refused(at: int, text: str) -> None:
    whole = key_format.mint().whole
    assert key_format.parse(whole[:at] + text + whole[at:]) is None


@given(st.integers(0, 48))
def test_a_shorter_text_and_swapped_characters_are_refused(at: int) -> None:
    whole = key_format.mint().whole
    assert key_format.parse(whole[:at]) is None and key_format.parse(whole[:at] + whole[at + 1 :]) is None
    swapped = whole[:at] + whole[at : at + 2][::-1] + whole[at + 2 :]
    assert swapped == whole or key_format.parse(swapped) is None


@given(st.text(CHARACTERS))
def test_any_other_text_is_refused(text: str) -> None:
    assert key_format.parse(text) is None


KEY = key_format.mint().whole


def basic(password: str) -> bytes:
    return b"Basic " + base64.b64encode(f"anybody:{password}".encode())


PLACES = {
    "bearer": ([(b"authorization", f"Bearer {KEY}".encode())], None),
    "small letters": ([(b"authorization", f"bearer   {KEY} ".encode())], None),
    "x-api-key": ([(b"x-api-key", f" {KEY} ".encode())], None),
    "api-key": ([(b"api-key", KEY.encode())], None),
    "basic": ([(b"authorization", basic(KEY))], None),
    "path": ([], KEY),
    "all": ([(b"authorization", f"Bearer {KEY}".encode()), (b"x-api-key", KEY.encode()), (b"api-key", KEY.encode())], KEY),
    "beside an empty one": ([(b"authorization", b"Bearer "), (b"x-api-key", KEY.encode())], None),
    "beside another scheme": ([(b"authorization", b"Digest x"), (b"authorization", basic(KEY))], None),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_key_is_found_in_each_place(place: str) -> None:
    assert key_format.find(*PLACES[place]) == KEY


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer ", b"Basic", b"Basic !!", b"Basic bm9wYXNzd29yZA==", b"Basic /////w==", b"nz_without_a_scheme"],
)
def test_an_authorization_header_without_a_key_is_no_key(value: bytes) -> None:
    with pytest.raises(MissingKey):
        key_format.find([(b"authorization", value)], None)


def test_a_colon_belongs_to_the_password() -> None:
    assert key_format.find([(b"authorization", basic("a:b"))], None) == "a:b"


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("path", "all")])
def test_two_different_keys_conflict(place: str) -> None:
    headers, _ = PLACES[place]
    with pytest.raises(ConflictingKeys):
        key_format.find(headers, key_format.mint().whole)
    with pytest.raises(ConflictingKeys):
        key_format.find([*headers, (b"x-api-key", key_format.mint().whole.encode())], None)


PLACEHOLDERS = {
    "ollama": "ollama",
    "sk": "sk-no-key-required",
    "the prefix": "nz_",
    "the README's": "nz_…",
    "cut short": KEY[:-1],
    "capitals": KEY.upper(),
    "twice": f"{KEY} {KEY}",
}


@pytest.mark.parametrize("placeholder", PLACEHOLDERS.values(), ids=PLACEHOLDERS)
def test_a_placeholder_beside_a_key_is_ignored(placeholder: str) -> None:
    """Client libraries insist on some key, also if the path carries one."""
    written = placeholder.encode()
    places = [(b"authorization", b"Bearer " + written), (b"authorization", basic(placeholder)), (b"x-api-key", written)]
    assert key_format.find(places, KEY) == KEY
    for place in places:
        assert key_format.find([place, (b"api-key", KEY.encode())], None) == KEY
        assert key_format.find([(b"api-key", KEY.encode()), place], "placeholder in the path") == KEY


def test_without_a_key_the_first_placeholder_is_taken() -> None:
    assert key_format.find([(b"authorization", b"Bearer ollama")], None) == "ollama"
    assert key_format.find([(b"x-api-key", b"second"), (b"authorization", b"Bearer third")], "first") == "first"
