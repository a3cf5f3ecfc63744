"""Bytes that calls hold in memory together: bounded for each caller and in total."""

from types import TracebackType
from typing import Self


class SharedBytes:
    """A caller may hold at most as much as is still free, so that others can hold some; subclasses define `check`."""

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0
        self._of: dict[str, int] = {}

    def of(self, caller: str) -> int:
        return self._of.get(caller, 0)

    def change(self, caller: str, by: int) -> None:
        self.used += by
        held = self._of.pop(caller, 0) + by
        if held:
            self._of[caller] = held

    def is_too_much(self, caller: str) -> bool:
        return self.of(caller) > self.most - self.used

    def check(self, caller: str) -> None:
        """Raises where the caller, or all together, hold too much."""
        raise NotImplementedError


class Reservation:
    """The part of SharedBytes that one call holds; `close` it, or use it in `with`."""

    __slots__ = ("_caller", "_shared", "_size")

    def __init__(self, shared: SharedBytes, caller: str = "") -> None:
        self._shared, self._caller, self._size = shared, caller, 0

    def hold(self, size: int) -> None:
        """Holds `size` bytes from now on, instead of those before. Raises what `check` raises; `close` is needed even then."""
        self._shared.change(self._caller, size - self._size)
        self._size = size
        self._shared.check(self._caller)

    def close(self) -> None:
        if self._size:
            self._shared.change(self._caller, -self._size)
            self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
