"""Finds the endpoint of a request in the table of all endpoints."""

from collections.abc import Callable, Mapping

from starlette.routing import Route
from starlette.routing import Router as PathTable
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.audit.record import Record
from gateway.core.errors import MethodNotAllowed, UnknownRoute
from gateway.proxy.suggestions import DID_YOU_MEAN, beginning, suggest

PAGES = frozenset({"/dashboard", "/playground", "/docs"})
OLLAMA_BANNER = b"Ollama is running"


class PathMethods:
    """The endpoints of one path, by method; HEAD is a GET whose body the server omits."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._endpoints: dict[str, ASGIApp] = {}

    def add(self, method: str, endpoint: ASGIApp) -> None:
        self._endpoints[method] = endpoint
        if method == "GET":
            self._endpoints.setdefault("HEAD", endpoint)

    def of(self, scope: Scope) -> ASGIApp:
        """The endpoint for a request. Raises MethodNotAllowed."""
        record: Record = scope["state"]["record"]
        record.route = self.path
        endpoint = self._endpoints.get(scope["method"])
        if endpoint is None:
            raise MethodNotAllowed(", ".join(sorted(self._endpoints)))
        return endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.of(scope)(scope, receive, send)


def router(endpoints: Mapping[tuple[str, str], ASGIApp]) -> Callable[[Scope], ASGIApp]:
    """A function that returns the endpoint of a request, and raises UnknownRoute or MethodNotAllowed."""
    by_path: dict[str, PathMethods] = {}
    for (method, path), endpoint in endpoints.items():
        by_path.setdefault(path, PathMethods(path)).add(method, endpoint)
    fixed = {path: methods for path, methods in by_path.items() if "{" not in path}
    variable = [Route(path, methods) for path, methods in by_path.items() if "{" in path]
    public = frozenset(path for path in fixed if path.startswith(("/v1/", "/api/")))

    async def unknown(scope: Scope, receive: Receive, send: Send) -> None:
        meant = suggest(scope["path"], public)
        page = scope["path"].rstrip("/")
        target = meant or (page if page in PAGES and page in fixed else "")
        raise UnknownRoute(DID_YOU_MEAN.format(target) if target else "", meant or beginning(scope["path"]))

    others = PathTable(variable, redirect_slashes=False, default=unknown)

    def find(scope: Scope) -> ASGIApp:
        # Paths without a variable part need no matching.
        methods = fixed.get(scope["path"])
        return others if methods is None else methods.of(scope)

    return find


async def ollama_banner(scope: Scope, receive: Receive, send: Send) -> None:
    """Ollama clients request this first, without a key."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(OLLAMA_BANNER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": OLLAMA_BANNER})
