"""Machines, a router and people together, over HTTP."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web

from tests.bench.fleet import boxes, figures, scenario, traffic
from tests.bench.fleet.router import Router
from tests.bench.fleet.rules import RULES
from tests.bench.fleet.scenario import BoxConfig, Group, Scenario

SPEED = 100.0
FOUND = Scenario(
    "small",
    60,
    (BoxConfig("a", {"llama3.2": 3}, vram=4, disk=3), BoxConfig("b", {"llama3.2": 3, "gemma3": 3}, vram=4, disk=3)),
    (
        Group("chat", "llama3.2", turn=40, answer=30, key="alice", people=3, system=50, think=2),
        Group("pictures", "gemma3", turn=20, answer=20, key="bob", picture=1, think=2, dialect="ollama"),
        Group("batch", "llama3.2", turn=60, answer=20, key="bob", at_once=2, think=1),
    ),
    20,
    1,
    scenario.find("office"),
)


async def posted(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The frames of the answer, or the only object."""
    async with http.post(url, json=body) as answer:
        lines = [line.removeprefix(b"data: ").strip() for line in (await answer.read()).splitlines()]
        return [orjson.loads(line) for line in lines if line.startswith(b"{")]


def test_a_box_answers_in_both_dialects_and_lists_what_it_has() -> None:
    async def test() -> None:
        message = [{"role": "user", "content": "word " * 8}]
        async with boxes.all_boxes(FOUND, SPEED, "own") as (a, b), aiohttp.ClientSession() as http:
            native = await posted(
                http, f"{b}/api/chat", {"model": "gemma3", "messages": message, "options": {"num_predict": 6}}
            )
            assert native[-1]["done"] and native[-1]["eval_count"] == 6 and native[-1]["prompt_eval_count"] == 10
            assert native[-1]["load_duration"] >= 1e9 and native[-1]["total_duration"] > native[-1]["load_duration"]
            assert "".join(frame["message"]["content"] for frame in native).split() == ["word"] * 6
            openai = {"model": "llama3.2", "messages": message, "max_tokens": 5}
            (whole,) = await posted(http, f"{a}/v1/chat/completions", openai)
            assert whole["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
            frames = await posted(http, f"{a}/v1/chat/completions", {**openai, "stream": True})
            assert frames[-1]["usage"]["completion_tokens"] == 5
            async with http.get(f"{b}/api/ps") as answer:
                (running,) = (await answer.json())["models"]
            async with http.get(f"{b}/api/tags") as answer:
                listed = {model["name"]: model for model in (await answer.json())["models"]}
            assert running["size_vram"] == listed["gemma3"]["size"] == 3_000_000_000
            assert len({model["digest"] for model in listed.values()}) == 2
            assert await posted(http, f"{b}/api/generate", {"model": "gemma3", "keep_alive": 0})
            async with http.get(f"{b}/api/ps") as answer:
                assert (await answer.json())["models"] == []

    asyncio.run(test())


def test_the_wall_clock_scales_what_a_box_reports() -> None:
    async def test() -> None:
        async with boxes.all_boxes(FOUND, SPEED, "wall") as (a, _), aiohttp.ClientSession() as http:
            frames = await posted(http, f"{a}/api/generate", {"model": "llama3.2", "prompt": "words"})
        assert 1e7 <= frames[-1]["load_duration"] < 1e8

    asyncio.run(test())


@pytest.mark.parametrize("rule", ["warm", "chwbl"])
def test_people_are_answered_through_a_router(rule: str) -> None:
    async def test() -> None:
        async with boxes.all_boxes(FOUND, SPEED, "own") as urls, aiohttp.ClientSession() as http:
            router = Router(RULES[rule](urls), urls, http)
            await router.discover()
            application = web.Application(client_max_size=boxes.LARGEST_BODY)
            application.router.add_post("/{path:.*}", router.pass_on)
            async with boxes.listening(application, 0) as url:
                rows = await traffic.send(FOUND, url, {}, SPEED, 1, [])
        found = figures.groups([{**vars(row), "ok": row.ok} for row in rows], FOUND.seconds)
        assert set(found) == {"all", "chat", "pictures", "batch"}
        assert found["all"]["failed"] == found["all"]["unfinished"] == 0 and found["all"]["requests"] > 20
        assert found["all"]["ttft_p50"] <= found["all"]["ttft_p95"]

    asyncio.run(test())


def test_groups_can_stay_away_and_unknown_models_fail() -> None:
    async def test() -> None:
        async with boxes.all_boxes(FOUND, SPEED, "own") as (url, _):
            rows = await traffic.send(replace(FOUND, seconds=10), url, {}, SPEED, 1, ["batch"])
        assert {row.who for row in rows} == {"chat", "pictures"}
        assert {row.status for row in rows if row.who == "pictures"} == {404}

    asyncio.run(test())


@pytest.mark.parametrize("folder", [scenario.SCENARIOS, scenario.PROBES])
def test_every_scenario_can_be_read(folder: Any) -> None:
    found = [scenario.read(path) for path in folder.glob("*.json")]
    assert found and all(one.key_names() and one.seconds >= 25 for one in found)


@pytest.mark.parametrize(
    "change", [lambda content: content["who"][0].update(model="none"), lambda content: content["boxes"][0].update(vram=1)]
)
def test_a_scenario_that_cannot_run_is_refused(change: Callable[[Any], None], tmp_path: Any) -> None:
    content = orjson.loads(scenario.find("office").read_bytes())
    change(content)
    (tmp_path / "wrong.json").write_bytes(orjson.dumps(content))
    with pytest.raises(ValueError, match=r"wrong\.json"):
        scenario.read(tmp_path / "wrong.json")
