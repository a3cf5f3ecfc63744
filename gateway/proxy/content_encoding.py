"""Decodes bodies that are compressed with gzip, deflate or zstd: a bounded piece at a time, within a bound of the whole."""

import sys
import zlib
from io import BytesIO
from typing import Protocol

from gateway.core.errors import BadRequest, UnsupportedEncoding

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

NOT_ENCODED = (b"", b"identity")
SUPPORTED = ("gzip", "deflate", "zstd")
SAME = {"x-gzip": "gzip"}
# A piece takes about a millisecond, and the worst input, small blocks each with a code of its own, ten.
LARGEST_PIECE_READ, LARGEST_PIECE_WRITTEN = 65_536, 262_144
# An empty member is few bytes and much work.
MOST_MEMBERS, MOST_MEMBERS_OF_A_PIECE = 1000, 100
WINDOW_LOG = 23
RAW, ZLIB, GZIP = -zlib.MAX_WBITS, zlib.MAX_WBITS, zlib.MAX_WBITS + 16
FULL_NAMES = {"zstd": f"zstd with a window of at most {2**WINDOW_LOG >> 20} MiB"}


def encoding_of(value: bytes) -> str:
    """The encoding that a Content-Encoding names. Raises UnsupportedEncoding for an unknown one and for several."""
    name = value.decode("latin-1").strip().lower()
    name = SAME.get(name, name)
    if name not in SUPPORTED:
        raise UnsupportedEncoding
    return name


class Decompressor(Protocol):
    """One stream, as zlib and zstd decompress it; `unused` is what it has not taken of the last piece."""

    @property
    def needs_input(self) -> bool: ...

    @property
    def eof(self) -> bool: ...

    @property
    def unused(self) -> bytes: ...

    def decompress(self, data: memoryview, max_length: int, /) -> bytes: ...


class Inflater:
    """A stream of zlib, of gzip or of neither, depending on `window_bits`."""

    needs_input = True

    def __init__(self, window_bits: int) -> None:
        self._stream = zlib.decompressobj(window_bits)

    def decompress(self, data: memoryview, max_length: int, /) -> bytes:
        return self._stream.decompress(data, max_length)

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def unused(self) -> bytes:
        return self._stream.unused_data if self._stream.eof else self._stream.unconsumed_tail


class ZstdFrame:
    """A frame of zstd, which keeps what it has taken and not decoded."""

    def __init__(self) -> None:
        self._frame = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})

    def decompress(self, data: memoryview, max_length: int, /) -> bytes:
        return self._frame.decompress(data, max_length)

    @property
    def needs_input(self) -> bool:
        return self._frame.needs_input

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused(self) -> bytes:
        return self._frame.unused_data


class Decoder:
    """Decodes one body. Raises BadRequest where it is broken, ends too early, or has bytes after its end."""

    def __init__(self, encoding: str, encoded: bytes) -> None:
        self._encoding, self._encoded, self._position = encoding, memoryview(encoded), 0
        self._decoded, self._members = BytesIO(), 0
        self._member = self._next_member()
        self.size, self.is_complete = 0, False

    @property
    def held(self) -> int:
        """Bytes in memory: the body in both forms, and of zstd the window, which is a copy of the last decoded bytes."""
        window = min(self.size, 2**WINDOW_LOG) if self._encoding == "zstd" else 0
        return len(self._encoded) + self.size + window

    def decode(self, most: int) -> None:
        """Decodes the next piece: up to `most` bytes of output, fewer where that is much work."""
        last, ends_at = self._position + LARGEST_PIECE_READ, self.size + most
        last_member = self._members + MOST_MEMBERS_OF_A_PIECE
        while self.size < ends_at and not self.is_complete:
            self._decode_on(last, ends_at - self.size)
            if self._position >= last or self._members >= last_member:
                break

    def _decode_on(self, last: int, most: int) -> None:
        piece = self._encoded[self._position : last] if self._member.needs_input else self._encoded[:0]
        try:
            decoded = self._member.decompress(piece, most)
        except (zlib.error, zstd.ZstdError):
            raise BadRequest(f"the body is not valid {self._name}, which its Content-Encoding names") from None
        self._position += len(piece) - len(self._member.unused)
        self.size += self._decoded.write(decoded)
        if self._member.eof:
            self._end_member()
        elif self._position == len(self._encoded) and len(decoded) < most:
            raise BadRequest(f"the body ends before its {self._encoding} stream does")

    def _end_member(self) -> None:
        self.is_complete = self._position == len(self._encoded)
        if self.is_complete:
            return
        if self._encoding == "deflate":
            raise BadRequest("the body has bytes after the end of its deflate stream")
        self._member = self._next_member()

    def _next_member(self) -> Decompressor:
        self._members += 1
        if self._members > MOST_MEMBERS:
            raise BadRequest(f"the body has more than {MOST_MEMBERS} {self._encoding} streams one after the other")
        if self._encoding == "zstd":
            return ZstdFrame()
        return Inflater(GZIP if self._encoding == "gzip" else _window_bits(self._encoded))

    @property
    def _name(self) -> str:
        return FULL_NAMES.get(self._encoding, self._encoding)

    def take(self) -> bytes:
        """All decoded bytes, without a copy."""
        return self._decoded.getvalue()

    def close(self) -> None:
        self._decoded.close()


def _window_bits(encoded: memoryview) -> int:
    """Of a body that is deflated: many clients send it without the header of zlib."""
    first, second = (*encoded[:2], 0, 0)[:2]
    return ZLIB if first & 15 == zlib.DEFLATED and not (first << 8 | second) % 31 else RAW
