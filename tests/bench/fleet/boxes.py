"""`python -m tests.bench.fleet.boxes SCENARIO`: serves all machines of a scenario; prints their URLs as JSON."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import orjson
import uvloop
from aiohttp import web

from tests.bench.fleet import ollama_wire, scenario
from tests.bench.fleet.clock import Clock
from tests.bench.fleet.machine import Call, Machine, QueueFull
from tests.bench.fleet.ollama_wire import NativeWire, OpenaiWire
from tests.bench.fleet.vram import Model

Wire = NativeWire | OpenaiWire
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LARGEST_BODY = 1 << 26
EMBEDDINGS = ("/api/embed", "/v1/embeddings")
GENERATIONS = ("/api/chat", "/api/generate", "/v1/chat/completions", "/v1/completions")


class BoxServer:
    """The HTTP routes of one machine."""

    def __init__(self, machine: Machine, scale: float) -> None:
        self._machine, self._scale = machine, scale

    def application(self) -> web.Application:
        application = web.Application(client_max_size=LARGEST_BODY)
        for path, content in self._lists().items():
            application.router.add_get(path, _json(content))
        application.router.add_get("/", _alive)
        application.router.add_post("/api/show", self._show)
        for path in (*GENERATIONS, *EMBEDDINGS):
            application.router.add_post(path, self._answer)
        return application

    def _lists(self) -> dict[str, Callable[[], Any]]:
        models = self._machine.models.values()
        return {
            "/api/version": lambda: {"version": "0.34.3"},
            "/api/tags": lambda: {"models": [ollama_wire.entry(model) for model in models]},
            "/api/ps": lambda: {"models": [self._running(model) for model in self._machine.vram.loaded()]},
            "/v1/models": lambda: {"object": "list", "data": [ollama_wire.openai_entry(model) for model in models]},
            "/_stats": self._machine.statistics,
        }

    def _running(self, model: Model) -> dict[str, Any]:
        clock = self._machine.clock
        return ollama_wire.running(model, (model.until - clock.now()) / clock.speed)

    async def _show(self, request: web.Request) -> web.Response:
        body = orjson.loads(await request.read())
        model = self._machine.find(str(body.get("model") or body.get("name")))
        if model is None:
            return web.json_response({"error": "model not found"}, status=404)
        return web.json_response(ollama_wire.show(model))

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        native = request.path.startswith("/api/")
        wire: Wire = NativeWire(request.path, self._scale) if native else OpenaiWire(request.path)
        model = self._machine.find(str(body.get("model")))
        if model is None:
            return web.json_response(wire.error(f"model {body.get('model')!r} not found"), status=404)
        model.keep_alive_s = model.keep_alive_s if (wanted := ollama_wire.keep_alive_of(body)) is None else wanted
        if isinstance(wire, NativeWire) and not (body.get("messages") or body.get("prompt") or body.get("input")):
            return await self._load_only(wire, model)
        output = 0 if request.path in EMBEDDINGS else ollama_wire.output_of(body, native=native)
        call = Call(model, ollama_wire.prompt_of(body), output)
        try:
            if output and body.get("stream", native):
                return await self._stream(request, wire, call)
            async with aclosing(self._machine.run(call)) as steps:
                async for _ in steps:
                    pass
        except QueueFull:
            busy = "server busy, please try again.  maximum pending requests exceeded"
            return web.json_response(wire.error(busy), status=503)
        return web.json_response(wire.whole(call))

    async def _load_only(self, wire: NativeWire, model: Model) -> web.Response:
        if model.keep_alive_s > 0:
            return web.json_response(wire.without_prompt(model, "load", await self._machine.load(model)))
        model.until = self._machine.clock.now()
        self._machine.vram.expire()
        return web.json_response(wire.without_prompt(model, "unload", 0))

    async def _stream(self, request: web.Request, wire: Wire, call: Call) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": wire.content_type})
        with suppress(ConnectionResetError):
            async with aclosing(self._machine.run(call)) as steps:
                before = 0
                async for done in steps:
                    if not before:
                        await response.prepare(request)
                    await response.write(wire.chunk(call, done - before))
                    before = done
            await response.write(wire.end(call))
            await response.write_eof()
        return response


def _json(content: Callable[[], Any]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response(content())

    return answer


async def _alive(request: web.Request) -> web.StreamResponse:
    return web.Response(text="Ollama is running")


@asynccontextmanager
async def listening(application: web.Application, port: int) -> AsyncIterator[str]:
    """The URL at which it answers."""
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def all_boxes(
    found: scenario.Scenario, speed: float, durations: scenario.Durations, base_port: int = 0
) -> AsyncIterator[list[str]]:
    """The URLs in the scenario's order; with a base port, they have the ports from there on."""
    scale = 1 if durations == "own" else 1 / speed
    async with AsyncExitStack() as stack:
        urls = []
        for number, box in enumerate(found.boxes):
            application = BoxServer(Machine(box, Clock(speed)), scale).application()
            port = base_port + number if base_port else 0
            urls.append(await stack.enter_async_context(listening(application, port)))
        yield urls


async def _serve(arguments: argparse.Namespace) -> None:
    found = scenario.read(arguments.scenario)
    async with all_boxes(found, arguments.speed, arguments.durations, arguments.base_port) as urls:
        print(json.dumps(urls), flush=True)
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenario", type=Path)
    parser.add_argument("--speed", type=float, default=20)
    parser.add_argument("--base-port", type=int, default=0)
    parser.add_argument("--durations", choices=("own", "wall"), default="own")
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
