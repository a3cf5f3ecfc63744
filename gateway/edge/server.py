"""The HTTP server: uvicorn with our protocol and a graceful shutdown."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from gateway.core.cancel_scope import ScopeTimer
from gateway.core.errors import ShuttingDown
from gateway.core.in_flight import InFlight
from gateway.edge.connection_limit import ConnectionLimit, most_connections
from gateway.edge.protocol import Protocol
from gateway.edge.stop_signals import stop_signals

LOG = logging.getLogger("gateway.server")
KEEP_ALIVE_S = 75
LAST_FRAMES_S = 5.0


class Server(uvicorn.Server):
    """Serves until a stop signal; then refuses new requests and lets those in progress finish within `drain_s`."""

    def __init__(
        self,
        application: ASGIApp,
        in_flight: InFlight,
        scope_timer: ScopeTimer,
        *,
        drain_s: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        config = uvicorn.Config(
            application,
            http=partial(Protocol, connection_limit=ConnectionLimit(most_connections())),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
            backlog=2048,
        )
        super().__init__(config)
        self._in_flight, self._scope_timer, self._drain_s, self._on_ready = in_flight, scope_timer, drain_s, on_ready
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(RuntimeError, ValueError):  # not in the main thread: the owner calls begin_drain
            for number in stop_signals():
                loop.add_signal_handler(number, self.begin_drain)
        yield

    def begin_drain(self) -> None:
        if self._draining is not None:
            self._scope_timer.end_all(ShuttingDown)
            return
        self._draining = asyncio.get_running_loop().create_task(self._drain(), name="drain")

    async def _drain(self) -> None:
        self._in_flight.draining = True
        LOG.info("draining: %d requests in flight, at most %g s", self._in_flight.total, self._drain_s)
        if not await self._in_flight.wait_idle(self._drain_s):
            LOG.warning("the time to drain is over: ending %d requests", self._in_flight.total)
        self._scope_timer.end_all(ShuttingDown)
        await self._in_flight.wait_idle(LAST_FRAMES_S)
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `::` accepts IPv4 as well. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if family == socket.AF_INET and not host.replace(".", "").isdigit():
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


def new_event_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def run(main: Any) -> None:
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)
