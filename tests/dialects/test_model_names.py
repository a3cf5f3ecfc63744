"""Spellings of model names, and the models that an allow-list contains."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.model_names import AllowList, canonical

ONE_MODEL = (
    "llama3.2 llama3.2:latest LLAMA3.2:Latest library/llama3.2 registry.ollama.ai/library/llama3.2:latest "
    "https://registry.ollama.ai/library/llama3.2 llama3.2:local llama3.2:latest:local"
).split()


@pytest.mark.parametrize("spelling", [*ONE_MODEL, "  llama3.2  "])
def test_all_spellings_of_a_model_have_one_canonical_name(spelling: str) -> None:
    assert canonical(spelling) == ("llama3.2:latest", False)


def test_tags_namespaces_and_hosts_make_different_models() -> None:
    different = ["llama3.2:3b", "me/llama3.2", "hf.co/me/llama3.2", "host:5000/ns/m", "llama3.2:cloud", "gpt-oss:120b-cloud"]
    assert len({canonical(name).canonical for name in [*different, "llama3.2"]}) == len(different) + 1
    assert canonical("host:5000/ns/m").canonical == "host:5000/ns/m:latest"


@pytest.mark.parametrize(
    ("name", "cloud"), [("a:cloud", True), ("a:CLOUD", True), ("a:7b-cloud", True), ("foo-cloud", False), ("a:latest", False)]
)
def test_names_of_cloud_models(name: str, cloud: bool) -> None:
    assert canonical(name).cloud is cloud


@pytest.mark.parametrize(
    ("patterns", "name", "cloud", "allowed"),
    [
        ((), "a:latest", False, True),
        ((), "a:cloud", True, False),
        (("a",), "a:latest", False, True),
        (("A:Latest",), "a:latest", False, True),
        (("a",), "a:7b", False, False),
        (("a*",), "abc:7b", False, True),
        (("*:7b",), "abc:7b", False, True),
        (("b*", "a"), "a:latest", False, True),
        (("*",), "a:cloud", True, False),
        (("*:cloud",), "a:cloud", True, True),
        (("a:cloud",), "a:cloud", True, True),
        (("a*",), "a:7b-cloud", True, False),
        (("hf.co/me/*",), "hf.co/me/m:q4", False, True),
        (("a.c",), "abc:latest", False, False),
        (("[ab]",), "a:latest", False, True),
    ],
)
def test_allow_lists(patterns: tuple[str, ...], name: str, cloud: bool, allowed: bool) -> None:
    assert AllowList(patterns).allows(name, cloud=cloud) is allowed


@given(st.text(max_size=60))
def test_the_canonical_name_of_a_canonical_name_is_itself(name: str) -> None:
    once = canonical(name)
    if not once.cloud:
        assert canonical(once.canonical).canonical == once.canonical or "://" in name or ":local" in name.lower()
