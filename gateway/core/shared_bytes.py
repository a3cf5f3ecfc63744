"""Bytes that callers hold together: bounded for each and for all."""


class SharedBytes:
    """No caller may hold more than is left, so that there is room for others."""

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
