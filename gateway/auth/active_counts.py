"""How many calls are in progress, by name."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class ActiveCounts(Counter[str]):
    """Names without a call in progress are removed, so that the memory is bounded by the calls."""

    @contextmanager
    def counting(self, name: str) -> Iterator[None]:
        self[name] += 1
        try:
            yield
        finally:
            self[name] -= 1
            if not self[name]:
                del self[name]
