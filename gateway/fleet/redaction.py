"""Removes a backend's token and address, which it may repeat, from what it sends before a caller gets it."""

import re
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from gateway.core import strict_json
from gateway.dialects.answers import try_read
from gateway.dialects.dialect import Framing
from gateway.fleet.backends.config import BackendConfig

BEARER = re.compile(r"(?i)bearer\s+\S+")
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"')
# In bytes: of a line of a frame; of a string of JSON with a secret in it.
LONGEST_ERROR, SHORTEST_SECRET = 32 * 1024, 3


def redact(text: str, backend: BackendConfig) -> str:
    """The text without the backend's token and address, in whatever spelling."""
    for secret in _secrets(backend.auth_token, backend.base_url):
        text = secret.sub("***", text)
    return BEARER.sub("Bearer ***", text)


@lru_cache(maxsize=1024)
def _secrets(token: str, base_url: str) -> tuple[re.Pattern[str], ...]:
    address = re.compile(_address(base_url), re.IGNORECASE)
    return (re.compile(_in_any_spelling(token), re.IGNORECASE), address) if token else (address,)


def _address(base_url: str) -> str:
    """With its scheme or slashes before it; or without them, then with its port unless only an address can look like this."""
    parts = urlsplit(base_url)
    host = _in_any_spelling(parts.netloc.removesuffix(f":{parts.port}"))
    port = parts.port or (443 if parts.scheme == "https" else 80)
    any_port = rf"(?:{_in_any_spelling(':')}\d{{1,5}})?"
    its_port = any_port if "." in parts.netloc or "[" in parts.netloc else _in_any_spelling(f":{port}")
    path = f"(?:{_in_any_spelling(parts.path.rstrip('/'))})?"
    with_slashes = rf"(?:https?{_in_any_spelling(':')})?{_in_any_spelling('//')}{host}{any_port}"
    return rf"(?:{with_slashes}|(?<![\w.-]){host}{its_port})(?![\w-]|\.\w){path}"


def _in_any_spelling(text: str) -> str:
    """A pattern for a text as it is, percent-encoded, or escaped as in JSON."""
    return "".join(
        re.escape(sign) if sign.isalnum() else rf"(?:\\?{re.escape(sign)}|%(?:25)?{ord(sign):02x}|\\u{ord(sign):04x})"
        for sign in text
    )


def redact_frames(frames: bytes, framing: Framing, backend: BackendConfig) -> bytes:
    """Whole frames, some of which may be errors: errors without the backend's secrets, all else byte for byte as it came."""
    for payload in framing.payloads(frames):
        if _is_error(try_read(payload)):
            # No string of JSON continues on the next line.
            for line in payload.split(b"\n"):
                if (redacted := _redact_json(line, backend)) != line:
                    frames = frames.replace(line, redacted)
    return frames


def _is_error(value: dict[str, Any]) -> bool:
    """Whether it is an error, or nothing that can be read. In llama.cpp's errors the message has no object around it."""
    choices = value.get("choices")
    parts = [value, value.get("response"), *(choices if isinstance(choices, list) else ())]
    is_error = "error" in (value.get("object"), value.get("type")) or isinstance(value.get("message"), str)
    return not value or is_error or any(isinstance(part, dict) and part.get("error") for part in parts)


def _redact_json(line: bytes, backend: BackendConfig) -> bytes:
    """A line of JSON stays JSON. In one too long for an error's message only the exact spelling is replaced."""
    if len(line) > LONGEST_ERROR:
        for secret in (backend.auth_token, backend.base_url):
            line = line.replace(secret.encode(), b"***") if secret else line
        return line
    return STRING.sub(lambda found: _redact_string(found[0], backend), line)


def _redact_string(string: bytes, backend: BackendConfig) -> bytes:
    if len(string) < SHORTEST_SECRET:
        return string
    try:
        text = strict_json.read_loosely(string)
    except ValueError:
        text = string[1:-1].decode("utf-8", "replace")
    redacted = redact(text, backend)
    return string if redacted == text else strict_json.write_with_replacements(redacted)
