"""`python -m tests.bench.fleet.router RULE URL…`: a bare router: no keys, no limits, no failover. Prints its URL as JSON."""

import argparse
import asyncio
import json
from contextlib import suppress

import aiohttp
import orjson
import uvloop
from aiohttp import web

from tests.bench.fleet.boxes import LARGEST_BODY, listening
from tests.bench.fleet.rules import RULES, Request, Rule, Upstream

# What is loaded is asked every two seconds of the machines; what they have on disk does not change.
POLL_S = 2.0
BUFFER = 1 << 20


class Router:
    def __init__(self, rule: Rule, urls: list[str], http: aiohttp.ClientSession) -> None:
        self._rule, self._http = rule, http
        self._upstreams = [Upstream(url) for url in urls]

    async def discover(self) -> None:
        for upstream in self._upstreams:
            upstream.models = await self._names(f"{upstream.url}/api/tags")

    async def watch(self, pause_s: float) -> None:
        """Never ends."""
        while True:
            for upstream in self._upstreams:
                with suppress(aiohttp.ClientError):
                    upstream.loaded = await self._names(f"{upstream.url}/api/ps")
            await asyncio.sleep(pause_s)

    async def pass_on(self, request: web.Request) -> web.StreamResponse:
        content = await request.read()
        wanted = request_of(content)
        able = [upstream for upstream in self._upstreams if wanted.model in upstream.models]
        if not able:
            return web.json_response({"error": f"no backend has {wanted.model!r}"}, status=404)
        upstream = self._rule(able, wanted)
        upstream.in_flight += 1
        try:
            return await self._relay(request, upstream.url + request.path, content)
        finally:
            upstream.in_flight -= 1

    async def _relay(self, request: web.Request, url: str, content: bytes) -> web.StreamResponse:
        async with self._http.post(url, data=content, headers={"Content-Type": "application/json"}) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.headers["Content-Type"]})
            with suppress(ConnectionResetError):
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            return response

    async def _names(self, url: str) -> set[str]:
        async with self._http.get(url) as answer:
            return {model["name"] for model in (await answer.json())["models"]}


def request_of(content: bytes) -> Request:
    body = orjson.loads(content)
    messages = body.get("messages") or []
    opening = next((message["content"] for message in messages if message["role"] == "user"), body.get("prompt", ""))
    return Request(body["model"], str(opening))


async def _serve(arguments: argparse.Namespace) -> None:
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=timeout, read_bufsize=BUFFER, auto_decompress=False
    ) as http:
        router = Router(RULES[arguments.rule](arguments.urls), arguments.urls, http)
        await router.discover()
        application = web.Application(client_max_size=LARGEST_BODY)
        application.router.add_post("/{path:.*}", router.pass_on)
        async with listening(application, 0) as url:
            print(json.dumps(url), flush=True)
            await router.watch(POLL_S / arguments.speed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rule", choices=RULES)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--speed", type=float, default=20)
    uvloop.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
