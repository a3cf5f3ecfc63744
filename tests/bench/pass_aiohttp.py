"""For comparison: a plain proxy with Starlette and aiohttp, without keys, limits or audit."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

HOP_BY_HOP = {"host", "content-length", "connection", "transfer-encoding", "keep-alive", "te", "trailer", "upgrade"}
UPSTREAM = os.environ.get("UPSTREAM", "http://127.0.0.1:9000")


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as app.state.session:
        yield


async def proxy(request: Request) -> StreamingResponse:
    headers = {name: value for name, value in request.headers.items() if name not in HOP_BY_HOP}
    answer = await request.app.state.session.request(
        request.method, UPSTREAM + request.url.path, data=await request.body(), headers=headers
    )

    async def body() -> AsyncIterator[bytes]:
        try:
            async for piece in answer.content.iter_any():
                yield piece
        finally:
            answer.release()

    kept = {name: value for name, value in answer.headers.items() if name.lower() != "transfer-encoding"}
    return StreamingResponse(body(), status_code=answer.status, headers=kept)


app = Starlette(routes=[Route("/{path:path}", proxy, methods=["GET", "POST"])], lifespan=lifespan)
