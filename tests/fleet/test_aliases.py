"""Aliases: how MODEL_ALIASES is read, and which models the names lead to."""

import json
import string
import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.model_entries import native_entry
from gateway.dialects.model_names import AllowList, canonical
from gateway.fleet.aliases import LONGEST_CHAIN, MOST_ALIASES, Aliases, read_aliases
from gateway.fleet.catalog import Catalog, Model, Snapshot, build

ALL = AllowList(())


def refusal(text: str) -> str:
    with pytest.raises(ValueError) as raised:
        read_aliases(text)
    return str(raised.value)


def targets(aliases: Aliases, name: str) -> tuple[str, ...]:
    alias = aliases.of(canonical(name))
    return alias.targets if alias else ()


# ── The setting ─────────────────────────────────────────────────────────────────────────────────────────────


def test_names_and_globs_lead_to_models() -> None:
    aliases = read_aliases('{"claude-*": "qwen3-coder:30b", "GPT-4o-mini": ["llama3.2", "library/gemma3:4b"], "*": "last"}')
    for spelling in ("gpt-4o-mini", "GPT-4O-MINI:latest", "library/gpt-4o-mini"):
        assert targets(aliases, spelling) == ("llama3.2:latest", "gemma3:4b")
    assert targets(aliases, "Claude-Opus-4") == targets(aliases, "claude-x:tag") == ("qwen3-coder:30b",)
    assert targets(aliases, "anything") == ("last:latest",)
    assert targets(aliases, "any:cloud") == targets(aliases, "any:20b-cloud") == ()
    assert [alias.written for alias in aliases] == ["GPT-4o-mini", "claude-*", "*"]


def test_the_first_glob_counts_and_a_name_before_all_of_them() -> None:
    aliases = read_aliases('{"a*": "one", "ab*": "two", "abc": "three"}')
    assert [targets(aliases, name) for name in ("ab", "abc", "b")] == [("one:latest",), ("three:latest",), ()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no", "the value is not valid JSON: "),
        ("[" * 100_000, "the value is nested too deeply"),
        ('["a"]', "the value must be a JSON object"),
        ("null", "the value must be a JSON object"),
        ('{"a": []}', "'a' must lead to a model, or to a list of models"),
        ('{"a": {}}', "'a' must lead to a model"),
        ('{"a": {"b": "c"}}', "'a' must lead to a model"),
        ('{"a": null}', "'a' must lead to a model"),
        ('{"a": [1]}', "a model of 'a' is no name"),
        ('{"a": ""}', "a model of 'a' is no name"),
        ('{"": "a"}', "'' is no name"),
        ('{" ": "a"}', "' ' is no name"),
        ('{"a\\n": "a"}', "'a\\n' is no name"),
        (json.dumps({"x" * 351: "a"}), "is no name"),
        ('{"a": "b*"}', "'a' leads to 'b*', which is a glob"),
        ('{"a": ["b", "B:latest"]}', "'a' leads to one model twice"),
        ('{"a": "b", "a": "c"}', "'a' and 'a' are the same name"),
        ('{"a": "b", "A:latest": "c"}', "'a' and 'A:latest' are the same name"),
        ('{"a*": "b", "A*": "c"}', "'a*' and 'A*' are the same name"),
        ('{"a": "b", "b": "c"}', "'a' leads to 'b:latest', which is an alias"),
        ('{"a*": "B", "b": "c"}', "'a*' leads to 'b:latest', which is an alias"),
        ('{"a": ["a", "b"], "b": "c"}', "'a' leads to 'b:latest', which is an alias"),
        ('{"a": "gpt-oss:120b-cloud"}', "'gpt-oss:120b-cloud' is a cloud model"),
        ('{"a:cloud": "b"}', "'a:cloud' is a cloud model"),
        ('{"*:cloud": "b"}', "'*:cloud' is a cloud model"),
        (json.dumps({"a": [f"m{n}" for n in range(LONGEST_CHAIN + 1)]}), f"'a' leads to 17 models; at most {LONGEST_CHAIN}"),
        (json.dumps({f"a{n}": "m" for n in range(MOST_ALIASES + 1)}), f"1001 aliases; at most {MOST_ALIASES}"),
        ('{"a": ' + "9" * 5000 + "}", "the value is not valid JSON"),
    ],
)
def test_a_wrong_value_is_refused_with_the_reason(text: str, expected: str) -> None:
    found = refusal(text)
    assert expected in found and "\n" not in found and len(found) < 400


def test_an_alias_may_have_the_name_of_a_model_of_its_chain() -> None:
    assert targets(read_aliases('{"a": ["b", "A"]}'), "a") == ("b:latest", "a:latest")


NAMES = st.text(string.ascii_lowercase + string.digits + ".-:/*?[]! ", min_size=1, max_size=12)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@given(entries=st.dictionaries(NAMES | st.text(), NAMES | st.lists(NAMES, max_size=20) | JSON_VALUES, max_size=8), name=NAMES)
@example(entries={"a[": "b"}, name="a[")
@example(entries={"[!]": "b"}, name="]")
def test_any_object_is_read_or_refused_in_one_line(entries: Mapping[str, Any], name: str) -> None:
    try:
        aliases = read_aliases(json.dumps(entries))
    except ValueError as refused:
        assert str(refused) and "\n" not in str(refused)
        return
    for alias in aliases:
        assert 1 <= len(alias.targets) <= LONGEST_CHAIN and not any(canonical(target).cloud for target in alias.targets)
        assert not {*alias.targets} & {*aliases.exact} - {alias.name}
    assert targets(aliases, name) == targets(aliases, name)


# ── The catalog ─────────────────────────────────────────────────────────────────────────────────────────────


def snapshot(backend: str, *names: str, age_s: float = 0.0, kind: str = "ollama", **more: Any) -> Snapshot:
    models = tuple(native_entry({"name": name, "digest": f"{backend}/{name}", **more}) for name in names)
    return Snapshot(backend, f"http://{backend}", kind, time.time() - age_s, models=models)


def catalog(aliases: Mapping[str, Any], *snapshots: Snapshot) -> Catalog:
    return build(snapshots, 60.0, read_aliases(json.dumps(aliases)))


def found(known: Catalog, name: str, *patterns: str) -> Model:
    model = known.find(canonical(name), AllowList(patterns))
    assert model is not None
    return model


def offers(model: Model) -> list[tuple[str, str]]:
    return [(offer.backend, offer.spelling) for offer in model.offers]


# They stay new, however long the other tests take.
ALPHA = snapshot("alpha", "llama3.2", "other", age_s=-3600)
BETA = snapshot("beta", "Gemma3:4b", "LLAMA3.2:latest", age_s=-3600)


def test_an_alias_has_the_offers_of_its_models_in_the_order_of_the_chain() -> None:
    known = catalog({"mini": ["missing", "gemma3:4b", "llama3.2"]}, ALPHA, BETA)
    model = found(known, "MINI:latest")
    assert offers(model) == [("beta", "Gemma3:4b"), ("alpha", "llama3.2"), ("beta", "LLAMA3.2:latest")]
    assert model.name == ("mini:latest", False) and model.counted_as == "mini:latest"
    assert (model.native["name"], model.native["model"], model.openai["id"]) == ("mini:latest", "mini:latest", "mini")
    assert model.native["digest"] == "beta/Gemma3:4b"


def test_its_entry_is_that_of_the_first_model_that_a_backend_offers_now() -> None:
    old = snapshot("alpha", "llama3.2", age_s=100)
    known = catalog({"mini": ["llama3.2", "gemma3:4b"]}, old, snapshot("beta", "gemma3:4b"))
    assert found(known, "mini").native["digest"] == "beta/gemma3:4b"
    gone = catalog({"mini": ["llama3.2"]}, old)
    assert "mini:latest" in gone.models and gone.listed(ALL) == []


def test_an_alias_wins_over_a_model_of_its_name_and_a_model_over_a_glob() -> None:
    shadowed = catalog({"llama3.2": "other"}, ALPHA)
    assert offers(found(shadowed, "llama3.2")) == [("alpha", "other")]
    assert offers(found(catalog({"*": "llama3.2"}, ALPHA), "other")) == [("alpha", "other")]
    with_substitute = catalog({"llama3.2": ["llama3.2", "other"]}, ALPHA)
    assert offers(found(with_substitute, "llama3.2")) == [("alpha", "llama3.2"), ("alpha", "other")]
    assert [model.name.canonical for model in with_substitute.listed(ALL)] == ["other:latest", "llama3.2:latest"]


def test_globs_lead_to_models_and_are_not_listed() -> None:
    known = catalog({"claude-*": "llama3.2", "gpt-*": "missing"}, ALPHA)
    model = found(known, "Claude-Opus-4.1")
    assert (model.name.canonical, model.counted_as) == ("claude-opus-4.1:latest", "claude-*")
    assert model.openai["id"] == model.native["name"] == "claude-opus-4.1:latest" and offers(model) == [("alpha", "llama3.2")]
    assert [model.name.canonical for model in known.listed(ALL)] == ["llama3.2:latest", "other:latest"]
    assert known.find(canonical("gpt-5"), ALL) is None and known.find(canonical("claude:cloud"), ALL) is None


def test_an_alias_to_nothing_is_no_model_and_is_known_to_operators() -> None:
    known = catalog({"mini": "missing", "other": "missing", "gpt-*": "missing", "m*": "llama3.2"}, ALPHA)
    for name in ("mini", "other", "gpt-5"):
        assert known.find(canonical(name), ALL) is None and known.lookup(canonical(name)) is None
        assert known.is_known(canonical(name))
    assert not known.is_known(canonical("unknown")) and known.is_known(canonical("llama3.2"))
    assert [known.reached(alias) is None for alias in known.aliases] == [True, True, True, False]


def test_the_allow_list_is_matched_with_the_name_of_the_alias_alone() -> None:
    known = catalog({"mini": "llama3.2", "claude-*": "llama3.2"}, ALPHA)
    for name in ("mini", "claude-x"):
        assert known.find(canonical(name), AllowList(("llama3.2",))) is None
        assert known.find(canonical(name), AllowList((name,))) is not None
    assert known.find(canonical("llama3.2"), AllowList(("mini", "claude-*"))) is None
    assert [model.name.canonical for model in known.listed(AllowList(("mini",)))] == ["mini:latest"]


def test_cloud_models_are_reached_through_no_alias() -> None:
    remote = snapshot("alpha", "remote", remote_host="https://elsewhere")
    known = catalog({"mini": ["remote", "llama3.2"], "claude-*": "remote"}, remote, snapshot("beta", "llama3.2"))
    assert offers(found(known, "mini")) == [("beta", "llama3.2")]
    assert known.find(canonical("claude-x"), ALL) is None


def test_running_models_have_the_names_of_aliases_too() -> None:
    known = catalog({"mini": ["other", "llama3.2"], "none": "other"}, ALPHA)
    running = {ALPHA.backend: ALPHA.models[:1]}
    names = [entry["name"] for entry in known.running_models(ALL, running)]
    assert names == ["llama3.2", "mini:latest"]
    entries = known.running_models(AllowList(("mini", "none")), running)
    assert [(entry["name"], entry["model"], entry["digest"]) for entry in entries] == [
        ("mini:latest",) * 2 + ("alpha/llama3.2",)
    ]


def test_the_context_of_an_alias_is_the_smallest_of_its_models() -> None:
    def vllm(backend: str, name: str, length: int) -> Snapshot:
        entry = {**native_entry({"name": name}), "openai": {"id": name, "max_model_len": length}}
        return Snapshot(backend, f"http://{backend}", "openai", time.time(), models=(entry,))

    known = catalog({"mini": ["a", "b", "llama3.2"]}, vllm("one", "a", 8000), vllm("two", "b", 4000), ALPHA)
    assert found(known, "mini").context == 4000 and found(catalog({"mini": "llama3.2"}, ALPHA), "mini").context == 0


def test_without_aliases_a_catalog_is_as_it_was() -> None:
    known = build((ALPHA, BETA), 60.0)
    assert set(known.models) == {"llama3.2:latest", "other:latest", "gemma3:4b"} and list(known.aliases) == []
    assert known.find(canonical("llama3.2"), ALL) is known.models["llama3.2:latest"]
    assert not any(model.targets for model in known.models.values())
