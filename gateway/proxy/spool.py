"""Uploads while they are sent to backends: up to a mebibyte in memory, more in a file that has no name."""

import logging
from collections.abc import Iterator
from tempfile import SpooledTemporaryFile
from types import TracebackType
from typing import Self

from gateway.core.errors import Overloaded
from gateway.core.shared_bytes import Reservation
from gateway.dialects import multipart
from gateway.dialects.multipart import Form
from gateway.proxy.body import UnfinishedBodies

LOG = logging.getLogger("gateway")
MOST_IN_MEMORY = 2**20
# What is read or written at once: pages of the system's cache, too little to delay other tasks.
PIECE = 65_536


class Spool:
    """`with Spool(uploads) as spool:` keeps what is added until the end of the block; `uploads` bounds that of all callers."""

    def __init__(self, uploads: UnfinishedBodies) -> None:
        self._uploads = uploads
        self._reservation = Reservation(uploads)
        self._file = SpooledTemporaryFile(MOST_IN_MEMORY)  # noqa: SIM115 the block closes it
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._file.close()
        self._reservation.close()

    def begin(self, caller: str) -> None:
        """What is added from now on is that caller's."""
        self._reservation = Reservation(self._uploads, caller)

    def add(self, piece: bytes) -> None:
        """Raises BodiesUnfinished or Overloaded where this is too much."""
        self._reservation.hold(self.size + len(piece))
        self.size += len(piece)
        try:
            for at in range(0, len(piece), PIECE):
                self._file.write(piece[at : at + PIECE])
        except OSError as wrong:
            LOG.error("an upload cannot be kept in the folder of temporary files: %s", wrong.strerror)
            raise Overloaded(retry_after=1, leaves_body=True) from wrong

    def between(self, start: int, end: int) -> Iterator[bytes]:
        """What was added, from one position to another, in pieces."""
        for at in range(start, end, PIECE):
            # Another reader may have moved the file's position since the last piece.
            self._file.seek(at)
            yield self._file.read(min(PIECE, end - at))


class SpooledForm:
    """A form in a spool, sent as it came but for the name of the model."""

    def __init__(self, spool: Spool, form: Form, boundary: bytes) -> None:
        self._spool, self.content_type = spool, multipart.content_type_of(boundary)
        self._start, self._end = form.spans.get("model", (0, 0))

    def length(self, model: str) -> int:
        return self._spool.size - (self._end - self._start) + len(model.encode())

    def pieces(self, model: str) -> Iterator[bytes]:
        yield from self._spool.between(0, self._start)
        yield model.encode()
        yield from self._spool.between(self._end, self._spool.size)
