"""What a request's head must have, beyond what its parser asks for."""

import re

from gateway.core.errors import BadRequest, GatewayError, UnsupportedTransferEncoding

# No host's name, and no port, has one of these.
NO_HOST = re.compile(rb"[\x00-\x20\x7f-\xff/\\?#@]")


# How a request's first line ends, without its line feed: the parser takes RTSP/1.0 and ICE/1.0 for HTTP of that version.
LINE_ENDS = (b" HTTP/1.1\r", b" HTTP/1.1", b" HTTP/1.0\r", b" HTTP/1.0")
LONGEST_LINE_END = 10


def fault_of(method: bytes, version: str, target: bytes, hosts: int, codings: tuple[bytes, ...]) -> GatewayError | None:
    """What RFC 9112 has a server refuse of a head that can be parsed; `hosts` counts a Host that is none for two."""
    if version not in ("1.0", "1.1"):
        return BadRequest("the gateway speaks HTTP/1.1 and HTTP/1.0")
    if b"#" in target:
        return BadRequest("the target of a request must not have a fragment: leave out the # and what follows")
    if method == b"CONNECT":
        return BadRequest("the gateway opens no tunnels: CONNECT is not for it")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return BadRequest("the request needs exactly one Host header, with a host's name in it")
    if codings and (version == "1.0" or codings[-1] != b"chunked" or codings.count(b"chunked") > 1):
        return BadRequest("the body's end cannot be told from this Transfer-Encoding; send it chunked, by HTTP/1.1")
    return UnsupportedTransferEncoding() if len(codings) > 1 else None
