"""Headers that Anthropic's clients read: the request's id, and limits with the times at which they are whole again."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

Header = tuple[bytes, bytes]

NAMES = {
    b"x-ratelimit-%b-%b" % (what, unit): b"anthropic-ratelimit-%b-%b" % (unit, what)
    for what in (b"limit", b"remaining", b"reset")
    for unit in (b"requests", b"tokens")
}
DURATION = re.compile(rb"(?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s)?|(\d+)ms")


def of(headers: Iterable[Header], request_id: str) -> list[Header]:
    """The headers to add, made from those of the OpenAI API among `headers`."""
    now = datetime.now(UTC)
    found = [(b"request-id", request_id.encode())]
    for name, value in headers:
        if name in NAMES:
            found.append((NAMES[name], _moment(now, value) if name.startswith(b"x-ratelimit-reset") else value))
    return found


def _moment(now: datetime, duration: bytes) -> bytes:
    """The end of a duration in Go's format, as RFC 3339, in whole seconds."""
    match = DURATION.fullmatch(duration)
    hours, minutes, seconds, milliseconds = match.groups(b"0") if match else (b"0",) * 4
    wait = timedelta(hours=int(hours), minutes=int(minutes), seconds=float(seconds), milliseconds=int(milliseconds))
    return f"{now + wait + timedelta(seconds=0.999):%Y-%m-%dT%H:%M:%SZ}".encode()
