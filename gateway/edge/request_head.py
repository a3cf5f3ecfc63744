"""Checks of a request's head that the parser does not perform."""

import re

from gateway.core.errors import BadRequest, GatewayError, UnsupportedTransferEncoding

# Characters that are in no host name and no port.
NO_HOST = re.compile(rb"[\x00-\x20\x7f-\xff/\\?#@]")


# The end of a request line without its line feed: the parser also accepts RTSP/1.0 and ICE/1.0.
LINE_ENDS = (b" HTTP/1.1\r", b" HTTP/1.1", b" HTTP/1.0\r", b" HTTP/1.0")
LONGEST_LINE_END = 10


def fault_of(method: bytes, version: str, target: bytes, hosts: int, codings: tuple[bytes, ...]) -> GatewayError | None:
    """The error of a head that can be parsed but that RFC 9112 forbids, or None; an invalid Host counts as two `hosts`."""
    if version not in ("1.0", "1.1"):
        return BadRequest("the gateway supports HTTP/1.1 and HTTP/1.0")
    if b"#" in target:
        return BadRequest("the target of a request must not have a fragment: leave out the # and what follows")
    if method == b"CONNECT":
        return BadRequest("the gateway opens no tunnels: CONNECT is not supported")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return BadRequest("the request needs exactly one Host header, with a host's name in it")
    if codings and (version == "1.0" or codings[-1] != b"chunked" or codings.count(b"chunked") > 1):
        return BadRequest("this Transfer-Encoding does not show where the body ends; send it chunked, with HTTP/1.1")
    return UnsupportedTransferEncoding() if len(codings) > 1 else None
