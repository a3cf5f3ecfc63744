"""The gateway's pages: files of this package, kept in memory, with a policy that allows no content from elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.core.asgi import SAME_ORIGIN
from gateway.core.errors import SettingsError

FOLDER = Path(__file__).parent / "static"
KINDS = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
# An operator's own page decides what it loads; it must only not be framed by other sites.
OWN_POLICY = "frame-ancestors 'none'"
HEADERS = [
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    *SAME_ORIGIN,
    (b"cache-control", b"no-cache"),
]


class Page:
    """A body that never changes; `policy` is its Content-Security-Policy."""

    def __init__(self, body: bytes, kind: str, policy: str = POLICY) -> None:
        self._body = body
        own = [(b"content-type", kind.encode()), (b"content-security-policy", policy.encode())]
        self._headers = [*own, (b"content-length", b"%d" % len(body)), *HEADERS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        await send({"type": "http.response.body", "body": self._body})


def of_file(file: Path, policy: str = POLICY) -> Page:
    """Read once. Raises OSError."""
    return Page(file.read_bytes(), KINDS.get(file.suffix, KINDS[".html"]), policy)


def routes(files: Mapping[str, str]) -> dict[tuple[str, str], ASGIApp]:
    """A GET route for each path, answered with that file of this package."""
    return {("GET", path): of_file(FOLDER / name) for path, name in files.items()}


def own_playground(own: str) -> dict[tuple[str, str], ASGIApp]:
    """The operator's file in place of the playground. Raises SettingsError."""
    try:
        return {("GET", "/playground"): of_file(Path(own), OWN_POLICY)}
    except OSError as error:
        raise SettingsError(f"PLAYGROUND_FILE must name a readable file: {type(error).__name__}") from None
