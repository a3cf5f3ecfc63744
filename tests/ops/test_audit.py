"""What operators get of the audit: lists, sums, verification, purging and forgetting, typed as they type them."""

import asyncio
import csv
import io
import json
import tracemalloc
from collections.abc import Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gateway.audit import retention
from gateway.core.errors import CommandFailed
from gateway.ops import main
from gateway.ops.cli import console
from gateway.stores.postgres import Database
from tests.conftest import TestStores
from tests.support.audit_rows import add_key, ago, in_database, prompt, row, sql, write, write_prompts
from tests.support.gateway_settings import settings_for

RunVerb = Callable[..., str]


@pytest.fixture
def url(stores: TestStores) -> str:
    add_key(stores.database_url, "k1", "alice")
    add_key(stores.database_url, "k2", "bob")
    return stores.database_url


@pytest.fixture
def run_verb(stores: TestStores, capsys: pytest.CaptureFixture[str]) -> RunVerb:
    """`run_verb("audit", "--key", "alice")`: what it prints on standard output."""
    settings = settings_for(DATABASE_URL=stores.database_url, REDIS_URL=stores.redis_url)

    def type_it(*typed: str) -> str:
        arguments = main.parser().parse_args(typed)
        capsys.readouterr()
        asyncio.run(main.VERBS[arguments.verb][0](settings, arguments))
        return capsys.readouterr().out

    return type_it


def lines(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines()]


def ids(printed: str) -> list[str]:
    return [found["request_id"] for found in lines(printed)]


# ── listing ──


def test_the_list_shows_the_main_columns(url: str, run_verb: RunVerb) -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    waited = {"chosen_because": "load", "queue_position": 3, "queue_ms": 7.04, "estimated_ms": 13.04}
    write(
        url,
        [
            row(at, key_id="k1", cached_tokens=2, backend_ms=80.25, load_ms=50.0, loaded=True, **waited),
            row(at - timedelta(hours=1), key_id="gone", status=0, backend="", ttfb_ms=None),
        ],
    )
    head, first, second = run_verb("audit").splitlines()
    assert (
        head.split()
        == (
            "TIME KEY CLIENT MODEL AS BACKEND STATUS OUTCOME TOKENS CACHED COUNTED BACKEND MS LOAD MS BECAUSE PLACE WAIT MS "
            "ESTIMATED MS TTFB MS TOTAL MS"
        ).split()
    )
    alice = "2026-01-02 03:04:05 alice 192.0.2.7 llama3.2:latest - alpha 200 answered 3+4 2 reported 80.2 50.0 load 3 7.0 13.0"
    assert first.split() == f"{alice} 12.5 99.1".split()
    assert (
        second.split()
        == "2026-01-02 02:04:05 gone 192.0.2.7 llama3.2:latest - - - answered 3+4 - reported - - - - 0.2 - - 99.1".split()
    )
    assert head.index("CLIENT") == first.index("192.") == second.index("192.")


def test_an_empty_list(url: str, run_verb: RunVerb, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb("audit") == run_verb("audit", "--json") == run_verb("audit", "--csv") == ""


def test_json_and_csv_have_every_column(url: str, run_verb: RunVerb) -> None:
    attempts = [{"backend": "beta", "fault": "refused", "ms": 1.5}]
    odd = {"detail": 'a "quoted", detail\nof two lines', "model": "\x1b[31mred"}
    way = {"translated_to": "/v1/chat/completions", "dropped": "tools.web_search, metadata"}
    seconds = {
        "load_ms": 1.5,
        "prefill_ms": 0.5,
        "decode_ms": None,
        "backend_ms": 2.0,
        "seconds_from": "reported",
        "loaded": True,
    }
    seconds |= {"chosen_because": "home", "estimated_ms": 3.5, "queue_position": 2}
    written = row(ago(0.5), key_id="k1", attempts=attempts, cached_tokens=2, billed_tokens=6, **way, **seconds, **odd)
    write(url, [written])
    (found,) = lines(run_verb("audit", "--json"))
    (plain,) = csv.DictReader(io.StringIO(run_verb("audit", "--csv")))
    assert found.keys() == plain.keys() == {*written, "batch", "key"}
    assert datetime.fromisoformat(found["at"]).timestamp() * 1e6 == pytest.approx(written["at"], abs=1)
    assert {**found, "at": 0} == {**written, "at": 0, "batch": 1, "key": "alice"}
    assert json.loads(plain["attempts"]) == attempts and plain["detail"] == written["detail"]
    assert datetime.fromisoformat(plain["at"]) == datetime.fromisoformat(found["at"])
    assert "\x1b" not in run_verb("audit")


def test_the_list_is_newest_first_and_limited(url: str, run_verb: RunVerb) -> None:
    write(url, [row(ago(days), request_id=str(days)) for days in (1, 40, 3, 70, 2)])
    assert ids(run_verb("audit", "--json")) == ["1", "2", "3", "40", "70"]
    assert ids(run_verb("audit", "--json", "--limit", "2")) == ["1", "2"]
    assert len(run_verb("audit", "--limit", "3").splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--key", "alice"], "1 5"),
        (["--key", "k1"], "1 5"),
        (["--key", "bob"], "2"),
        (["--model", "llama3.2"], "1 2 5"),
        (["--model", "LLAMA3.2:Latest"], "1 2 5"),
        (["--model", "qwen"], ""),
        (["--model", "qwen*"], "3"),
        (["--model", "*:8?"], "3"),
        (["--model", "a_b%c\\d"], "4"),
        (["--model", "a?b%*"], "4"),
        (["--model", "aXb*"], ""),
        (["--model", "*"], "1 2 3 4 5"),
        (["--since", "36h"], "1 2"),
        (["--since", f"{ago(2.5):%Y-%m-%dT%H:%M:%S}"], "1 2 3"),
        (["--since", ago(3.5).isoformat()], "1 2 3 4"),
        (["--since", "1969-01-01"], "1 2 3 4 5"),
        (["--since", "0001-01-01"], "1 2 3 4 5"),
        (["--status", "429"], "2"),
        (["--status", "4xx"], "2 3"),
        (["--status", "5XX"], ""),
        (["--outcome", "refused"], "2 3"),
        (["--outcome", "refused:rate_limited"], "2"),
        (["--outcome", "%"], ""),
        (["--key", "alice", "--since", "36h", "--status", "2xx"], "1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "T" not in value[1] else "",
)
def test_filters(url: str, run_verb: RunVerb, words: list[str], expected: str) -> None:
    changes: list[dict[str, Any]] = [
        {"key_id": "k1"},
        {"key_id": "k2", "status": 429, "outcome": "refused:rate_limited", "model": "Llama3.2"},
        {"status": 403, "outcome": "refused:model_not_available", "model": "qwen3:8b"},
        {"model": "a_b%c\\d:latest"},
        {"key_id": "k1"},
    ]
    write(url, [row(ago(n + 0.1), request_id=str(n + 1), **change) for n, change in enumerate(changes)])
    assert ids(run_verb("audit", "--json", *words)) == expected.split()


def test_a_name_finds_revoked_keys_and_the_newer_of_two_keys(url: str, run_verb: RunVerb) -> None:
    sql(url, "UPDATE keys SET revoked_at = now(), created_at = now() - interval '1 day' WHERE name = 'alice'")
    write(url, [row(ago(1), key_id="k1", request_id="old"), row(ago(1), key_id="k3", request_id="new")])
    assert ids(run_verb("audit", "--json", "--key", "alice")) == ["old"]
    add_key(url, "k3", "alice")
    assert ids(run_verb("audit", "--json", "--key", "alice")) == ["new"]
    assert ids(run_verb("audit", "--json", "--key", "k1")) == ["old"]


@pytest.mark.parametrize("key", ["carol", "\x00"])
@pytest.mark.parametrize("verb", ["audit", "forget"])
def test_an_unknown_key(url: str, run_verb: RunVerb, verb: str, key: str) -> None:
    with pytest.raises(CommandFailed, match=r"there is no key .*: see `make keys`"):
        run_verb(verb, "--key", key)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["audit", "--since", "yesterday"], "'yesterday' is not a time: write 24h, 7d, 2026-01-31"),
        (["audit", "--since", "2026-13-01"], "is not a time"),
        (["audit", "--status", "6xx"], "'6xx' is not a status: write a number such as 429"),
        (["audit", "--status", "-1"], "STATUS= (--status)"),
        (["audit", "--limit", "0"], "'0' is not a number of rows: write a whole number from 1"),
        (["audit", "--model", "\udcff"], "cannot be in the audit"),
        (["audit", "--outcome", "a\nb"], "cannot be in the audit"),
        (
            ["usage", "--by", "key,colour"],
            "'key,colour' is not something to group by: write one or more of key,model,",
        ),
        (["usage", "--by", ""], "is not something to group by"),
        (["forget"], "KEY= (--key)"),
    ],
)
def test_invalid_arguments(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["audit", "usage"])
def test_json_or_csv(url: str, run_verb: RunVerb, verb: str) -> None:
    with pytest.raises(CommandFailed, match="JSON=1 and CSV=1 exclude each other"):
        run_verb(verb, "--json", "--csv")


def test_any_number_of_rows_is_listed_in_little_memory(url: str, run_verb: RunVerb) -> None:
    write(url, *([row(ago(1), request_id=f"{batch} {n}") for n in range(1000)] for batch in range(5)))
    assert len(set(ids(run_verb("audit", "--json")))) == 5000
    table = run_verb("audit").splitlines()
    assert len(table) == 5001 and {line.index("192.") for line in table[1:]} == {table[0].index("CLIENT")}

    async def run(database: Database) -> int:
        asked = [None] * 8
        async with aclosing(database.stream("list_audit", *asked, timeout_s=10)) as rows:
            await anext(rows)
            tracemalloc.start()
            seen = sum([1 async for _ in rows])
        assert tracemalloc.get_traced_memory()[1] < 3_000_000
        tracemalloc.stop()
        return seen

    assert in_database(url, run) == 4999


def test_a_stream_left_early_frees_its_connection(url: str) -> None:
    write(url, [row(ago(1)) for _ in range(600)])

    async def run(database: Database) -> None:
        for _ in range(5):
            async with aclosing(database.stream("list_audit", *[None] * 8, timeout_s=10)) as rows:
                await anext(rows)

    in_database(url, run)


# ── sums ──


def test_usage_by_key(url: str, run_verb: RunVerb) -> None:
    outcomes = ["answered", "answered", "backend_failed", "truncated", "refused:rate_limited", "client_gone"]
    rows = [row(ago(1), key_id="k1", outcome=outcome, ttfb_ms=None) for outcome in outcomes]
    rows[0] |= {"cached_tokens": 3, "billed_tokens": 5}
    rows[1] |= {"cached_tokens": 1, "backend_ms": 1501.0, "load_ms": 0.5, "loaded": False}
    rows[2] |= {"backend_ms": 2000.0, "load_ms": 1250.0, "loaded": True}
    write(url, rows, [row(ago(1), key_id="k2", ttfb_ms=float(n)) for n in range(101)], [row(ago(31), key_id="k2")])
    bob, alice = lines(run_verb("usage", "--json"))
    assert alice == {
        "key": "alice",
        "key_id": "k1",
        "requests": 6,
        "answered": 2,
        "failures": 2,
        "refused": 1,
        "prompt_tokens": 18,
        "completion_tokens": 24,
        "cached_tokens": 4,
        "billed_tokens": 40,
        "backend_s": 3.501,
        "load_s": 1.25,
        "loads": 1,
        "ttfb_p50_ms": None,
        "ttfb_p95_ms": None,
        "ttfb_p99_ms": None,
    }
    assert (bob["key"], bob["requests"], bob["ttfb_p50_ms"], bob["ttfb_p95_ms"], bob["ttfb_p99_ms"]) == ("bob", 101, 50, 95, 99)
    head, first, second = run_verb("usage").splitlines()
    assert head.split()[:3] == ["KEY", "REQUESTS", "ANSWERED"] and first.split()[:2] == ["bob", "101"]
    assert second.split() == "alice 6 2 2 1 18 24 4 40 3.501 1.25 1 - - -".split()


def test_usage_by_several_columns(url: str, run_verb: RunVerb) -> None:
    day = ago(1).replace(hour=12)
    write(url, [row(day, model=model, backend=backend) for model, backend in (("a", "x"), ("a", "y"), ("a", "y"), ("b", "y"))])
    found = list(csv.DictReader(io.StringIO(run_verb("usage", "--csv", "--by", "model,backend,day"))))
    assert [(each["model"], each["backend"], each["requests"]) for each in found] == [
        ("a:latest", "y", "2"),
        ("a:latest", "x", "1"),
        ("b:latest", "y", "1"),
    ]
    assert {each["day"] for each in found} == {f"{day:%Y-%m-%d}"} and "key" not in found[0]
    (sums,) = lines(run_verb("usage", "--json", "--by", "day", "--since", "2d"))
    assert (sums["day"], sums["requests"]) == (f"{day:%Y-%m-%d}", 4)
    assert run_verb("usage", "--since", "0") == ""


def test_aliases_have_both_names(url: str, run_verb: RunVerb) -> None:
    pairs = [
        ("mini", "llama3.2:latest"),
        ("MINI", "Llama3.2"),
        ("mini", "gemma3:4b"),
        ("llama3.2", "llama3.2:latest"),
        ("x", ""),
    ]
    write(url, [row(ago(1), model=model, answered_as=answered) for model, answered in pairs])
    found = lines(run_verb("usage", "--json", "--by", "model,answered_as"))
    assert {(one["model"], one["answered_as"]): one["requests"] for one in found} == {
        ("mini:latest", "llama3.2:latest"): 2,
        ("mini:latest", "gemma3:4b"): 1,
        ("llama3.2:latest", "llama3.2:latest"): 1,
        ("x:latest", None): 1,
    }
    served = lines(run_verb("usage", "--json", "--by", "answered_as"))
    assert {one["answered_as"]: one["requests"] for one in served} == {"llama3.2:latest": 3, "gemma3:4b": 1, None: 1}
    assert "model" not in served[0]
    shown = {tuple(line.split()[-16:-14]) for line in run_verb("audit").splitlines()[1:]}
    assert shown == {("mini", "llama3.2:latest"), ("MINI", "Llama3.2"), ("mini", "gemma3:4b"), ("llama3.2", "-"), ("x", "-")}


# ── verification ──


def test_verifying_an_unchanged_audit(url: str, run_verb: RunVerb) -> None:
    write(url, [row(ago(1)), row(ago(1))], [row(ago(1))])
    (digest,) = sql(url, "SELECT encode(digest, 'hex') FROM audit_batches WHERE id = 2")
    verdict = json.loads(run_verb("audit-verify", "--json"))
    assert verdict == {"whole": True, "batches": 2, "rows": 3, "purged": 0, "newest_batch": 2, "digest": digest, "findings": []}
    assert run_verb("audit-verify").splitlines()[-1].split() == ["digest", digest]


def test_verifying_a_changed_audit(url: str, run_verb: RunVerb, capsys: pytest.CaptureFixture[str]) -> None:
    write(url, [row(ago(1)), row(ago(1))])
    sql(url, "DELETE FROM audit WHERE id = (SELECT id FROM audit LIMIT 1)")
    with pytest.raises(CommandFailed, match="the audit is not as it was written: 1 findings"):
        run_verb("audit-verify", "--json")
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["found"], finding["batch"], finding["rows_expected"]) == ("missing rows: 1", 1, 2)
    with pytest.raises(CommandFailed):
        run_verb("audit-verify")
    assert "missing rows: 1" in capsys.readouterr().out


# ── purging and forgetting ──


def test_purging_now(url: str, run_verb: RunVerb) -> None:
    write(url, [row(ago(400))], [row(ago(1))])
    went = json.loads(run_verb("purge", "--json"))
    assert went == {"audit_rows": 1, "whole_months": [f"audit_{ago(400):%Y_%m}"], "prompts": 0}
    assert run_verb("purge").split() == ["audit_rows", "0", "whole_months", "-", "prompts", "0"]
    assert len(ids(run_verb("audit", "--json"))) == 1


def test_purging_during_another_purge(url: str, run_verb: RunVerb, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(*_: object) -> retention.Removed:
        return retention.Removed(is_busy_elsewhere=True)

    monkeypatch.setattr(retention, "apply", busy)
    with pytest.raises(CommandFailed, match="another process is purging at the moment: try again"):
        run_verb("purge")


def test_forget_deletes_prompts_now(url: str, run_verb: RunVerb) -> None:
    sql(url, "UPDATE keys SET prompt_log = true, revoked_at = now()")
    write_prompts(url, [prompt(ago(1), key) for key in ("k1", "k1", "k2")], timedelta(days=30))
    assert json.loads(run_verb("forget", "--key", "alice", "--json")) == {"key": "k1", "name": "alice", "prompts_deleted": 2}
    assert sql(url, "SELECT key_id FROM prompts") == ["k2"]
    assert len(sql(url, "SELECT id FROM keys WHERE prompts_forgotten_at IS NOT NULL")) == 1


def test_no_csv_cell_is_a_formula(capsys: pytest.CaptureFixture[str]) -> None:
    """What anybody may write, as a model's name or an agent, must do nothing in a spreadsheet."""
    out = console.Csv()
    out.add({"agent": '=cmd|" /C calc"!A1', "model": "@SUM(1)", "tokens": -3, "key": "plain - name"})
    assert list(csv.reader(io.StringIO(capsys.readouterr().out)))[1] == [
        '\'=cmd|" /C calc"!A1',
        "'@SUM(1)",
        "-3",
        "plain - name",
    ]
