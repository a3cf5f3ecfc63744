"""The format of a key, `nz_<id>_<secret><checksum>`, and the places a request may carry one."""

import base64
import binascii
import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway.core.errors import ConflictingKeys, MissingKey

PREFIX = "nz"
ID_BYTES, SECRET_BYTES, CHECKSUM_CHARACTERS = 5, 20, 6
ID_LENGTH, SECRET_LENGTH = 8, 32 + CHECKSUM_CHARACTERS
ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyz234567")
KEY_IN_TEXT = re.compile(rf"{PREFIX}_([a-z2-7]{{{ID_LENGTH}}})_[a-z2-7]+")


@dataclass(frozen=True)
class PresentedKey:
    """A text in the format of a key; whether there is such a key is not known yet."""

    secret_id: str
    whole: str = field(repr=False)

    @property
    def digest(self) -> str:
        return digest(self.whole)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def mint() -> PresentedKey:
    secret_id = _encode(secrets.token_bytes(ID_BYTES))
    body = f"{PREFIX}_{secret_id}_{_encode(secrets.token_bytes(SECRET_BYTES))}"
    return PresentedKey(secret_id, body + _checksum(body))


def parse(text: str) -> PresentedKey | None:
    """None if the format or the checksum is wrong: such a text was never a key."""
    parts = text.split("_")
    if len(parts) != 3 or parts[0] != PREFIX or len(parts[1]) != ID_LENGTH or len(parts[2]) != SECRET_LENGTH:
        return None
    if not ALPHABET.issuperset(parts[1] + parts[2]):
        return None
    body, checksum = text[:-CHECKSUM_CHARACTERS], text[-CHECKSUM_CHARACTERS:]
    return PresentedKey(parts[1], text) if secrets.compare_digest(_checksum(body), checksum) else None


def redacted(text: str) -> str:
    """The text with each key in it cut down to its id, for logs and messages."""
    return KEY_IN_TEXT.sub(rf"{PREFIX}_\1_…", text)


def _encode(data: bytes) -> str:
    return base64.b32encode(data).decode().lower().rstrip("=")


def _checksum(body: str) -> str:
    return _encode(hashlib.sha256(body.encode()).digest())[:CHECKSUM_CHARACTERS]


def find(headers: Iterable[tuple[bytes, bytes]], in_path: str | None) -> str:
    """The key of a request: from its path, Authorization (Bearer, or the password of Basic), x-api-key or api-key.

    Beside a key, texts that are not in the format of one are ignored, as clients insist on sending something. Raises
    MissingKey, or ConflictingKeys if there are two different keys.
    """
    found = {in_path} if in_path else set()
    first = in_path or ""
    for name, value in headers:
        if name == b"authorization":
            presented = _from_authorization(value.decode("latin-1"))
        elif name in (b"x-api-key", b"api-key"):
            presented = value.decode("latin-1").strip()
        else:
            continue
        found.add(presented)
        first = first or presented
    found.discard("")
    if not found:
        raise MissingKey
    return first if len(found) == 1 else _only_key(found) or first


def _only_key(found: set[str]) -> str:
    """The only one in the format of a key, "" if there is none."""
    keys = [text for text in found if parse(text) is not None]
    if len(keys) > 1:
        raise ConflictingKeys
    return keys[0] if keys else ""


def _from_authorization(value: str) -> str:
    scheme, _, credentials = value.strip().partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return _password(credentials.strip()) if scheme.lower() == "basic" else ""


def _password(credentials: str) -> str:
    try:
        return base64.b64decode(credentials, validate=True).decode("utf-8").partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""
